"""calibrate, fairness and fairness_table as users call them, from aligned files to reports."""

import json
import re
from dataclasses import replace
from itertools import islice

import jax
import numpy as np
import pytest

from experiments import calibrate, fairness
from experiments.benchmarks import routing as benchmark_routing
from experiments.configs import mixed_scripts_routed, mixed_scripts_single
from experiments.rate_control import __main__ as controller_table
from experiments.scripts import __main__ as fairness_table
from hnet import load
from hnet.data import eval_batches, open_corpus, train_batches
from hnet.data.row_routes import unknown_script
from hnet.errors import ConfigError
from hnet.train import loop
from hnet.train.named import base_config
from hnet.train.workdir import read_config
from tests.training import build, rows, tiny_run

pytestmark = pytest.mark.usefixtures("quick_compilation")

LINES = {  # aligned; some mix scripts, digits, emoji and right-to-left words
    "eng": [f"line {i} of some small text" for i in range(11)],
    "rus": [f"строка {i} очень маленького текста" for i in range(11)],
    "jpn": [f"{i}番目の行、small text もあり 🙂 שלום" for i in range(11)],
    "hin": [f"पंक्ति {i} छोटे पाठ की" for i in range(11)],
}


@pytest.fixture
def files(tmp_path):
    for name, lines in LINES.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "short.txt").write_text("one\ntwo\n")
    return {name: f"{name}={tmp_path}/{name}.txt" for name in LINES}


def call(monkeypatch, command, *argv):
    monkeypatch.setattr("sys.argv", ["command", *map(str, argv)])
    return command.main()


def held_run(workdir):
    tiny = tiny_run(workdir)
    outer, inner = tiny.model.stages
    outer = replace(outer, chunking=replace(outer.chunking, hold_rate=True))
    return replace(tiny, model=replace(tiny.model, stages=(outer, inner)))


def test_calibrate_writes_a_configuration_with_equal_chunks(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "routed.json"
    text = ["--files", files["eng"], files["rus"], "--mean-ratio", 5]
    call(monkeypatch, calibrate, *text, "--base", "mixed_scripts_single", "--out", out)
    config = base_config(str(out))
    chunking = config.model.stages[0].chunking
    assert config.model.route_groups == (("Cyrillic",), ("Latin",))
    assert config.workdir == "runs/routed" and config.rate_control.fit_default
    assert chunking.routes == 3 and chunking.hold_rate
    eng, rus = (sum(len(t.encode()) for t in LINES[k]) for k in ("eng", "rus"))
    N_default, N_cyrillic, N_latin = chunking.target_ratios
    assert N_default == N_latin
    assert N_cyrillic / N_latin == pytest.approx(rus / eng, rel=0.01)
    assert (eng + rus) / (eng / N_latin + rus / N_cyrillic) == pytest.approx(
        5, rel=2e-3
    )  # the first letter's first byte
    shown = capsys.readouterr().out
    assert "Cyrillic" in shown and f"{N_cyrillic:.3f}" in shown

    for changes, says in [
        (["--out", out], "routed.json' exists"),
        (["--mean-ratio", 1.2], r"mean_ratio=1.2 asks for 0.\d+ bytes per chunk.*at least"),
        (["--mean-ratio", 1], "mean_ratio=1.0: use above 1"),
        (["--groups", "Cyrilic"], "'Cyrilic'.*nearest is 'Cyrillic'"),
        (["--files", files["eng"], f"rus={tmp_path}/short.txt"], "'eng': 11, 'rus': 2"),
    ]:
        with pytest.raises(ConfigError, match=says):
            call(monkeypatch, calibrate, *text, *changes)


def test_comparable_text_is_counted_as_a_whole(files, tmp_path, monkeypatch, capsys):
    argv = ["--files", files["eng"], f"rus={tmp_path}/short.txt", "--mean-ratio", 5]
    call(monkeypatch, calibrate, *argv, "--aligned", False)
    assert "11" in capsys.readouterr().out


def test_fairness_compares_bytes_and_tokenizers(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report"
    argv = ["--files", files["eng"], files["rus"], "--unseen", files["hin"], "--out", out]
    bpe = ["--bpe", 300, "--bpe-files", files["eng"], files["rus"]]
    call(monkeypatch, fairness, *argv, *bpe, "--max-lines", 7)
    content = json.loads((out / "report.json").read_text())
    single_bytes, tokens = content["systems"]
    assert tokens["name"] == "BPE 300" and content["unseen"] == ["hin"]
    measured = [LINES["rus"][i * 11 // 7].encode() for i in range(7)]
    rus = single_bytes["languages"]["rus"]
    assert rus["chunks"] == [sum(map(len, measured))] and rus["sentences"] == 7
    assert tokens["languages"]["rus"]["chunks"] < rus["chunks"]
    assert "hin (unseen)" in (out / "report.md").read_text()
    assert "<svg" in (out / "chunks.svg").read_text()
    assert "BPE 300" in capsys.readouterr().out

    other = ["--out", tmp_path / "other"]
    for changes, says in [
        (argv, r"report.md' exists"),
        ([*argv, *other, "--bpe", 300], "belong together"),
        ([*argv, *other, "--unseen", files["eng"]], "'eng' is in files too"),
        ([*argv, *other, "--gold", "eng"], "gold='eng': write LANGUAGE=FILE"),
        ([*argv, *other, "--checkpoint", tmp_path / "nowhere"], "nowhere"),
    ]:
        with pytest.raises(ConfigError, match=says):
            call(monkeypatch, fairness, *changes)


@pytest.mark.parametrize("change", [{}, {"routed_parameters": False}, {"hold_rate": False}])
def test_calibrated_default_route_is_fitted_where_something_fits_it(tmp_path, change):
    base = held_run(tmp_path)
    outer, inner = base.model.stages
    outer = replace(outer, chunking=replace(outer.chunking, **change))
    base = replace(base, model=replace(base.model, stages=(outer, inner)))
    found = calibrate.Calibration((("Latin",), ("Greek",)), (3.0, 3.0, 4.0), np.ones((2, 3)))
    config = calibrate.with_routes(base, found)
    assert config.rate_control.fit_default == (not change)
    assert config.model.stages[0].chunking.target_ratios == (3.0, 3.0, 4.0)


def check_rates(shown, config):
    """The printed chunk sizes are those of the saved model, counted again.

    Another program counts them, so one or two boundaries near the threshold may differ.
    """
    model, corpus = load(config.workdir), open_corpus(config.data)
    names, groups = config.model.route_names, config.model.route_groups
    cut = jax.jit(lambda ids, segments, routes: model(ids, segments, route_ids_BL=routes)[1][0])

    def counted(batches):
        """Name -> positions and boundaries."""
        counts = np.zeros((2, len(names)))
        for batch in batches:
            fed = [batch[name] for name in ("input_ids", "segment_ids", "route_ids")]
            is_cut, valid = np.asarray(cut(*fed).boundary_mask_BL), fed[1] != 0
            counts += [[np.sum(on & (fed[2] == r)) for r in range(len(names))]
                       for on in (valid, is_cut)]  # fmt: skip
        return dict(zip(names, counts.T))

    def made_up():
        for k, batch in enumerate(eval_batches(corpus.heldout, config.data, route_groups=groups)):
            tables = [unknown_script(config.seed, 8 * k + i, 1.0) for i in range(8)]
            ids = np.stack([table[row] for table, row in zip(tables, batch["input_ids"])])
            yield batch | {"input_ids": ids, "route_ids": np.zeros_like(ids)}

    with train_batches(corpus, config.data, seed=config.seed, route_groups=groups) as batches:
        last = counted(islice(batches, config.train.steps))
    heldout = counted(eval_batches(corpus.heldout, config.data, route_groups=groups))
    last["default"], heldout["default"] = (0, 0), counted(made_up())["default"]
    for name, N in zip(names, config.model.stages[0].chunking.target_ratios):
        line = next(line for line in shown.splitlines() if line.startswith(f"  {name}: target {N}"))
        for counts, where in [(last, "in the last 8 batches"), (heldout, "held out")]:
            positions, boundaries = counts[name]
            found = re.search(rf"([\d.]+) {where} \(([-+][\d.]+)%\)", line)
            assert bool(found) == bool(positions)
            if found:
                printed, off = map(float, found.groups())
                assert abs(positions / printed - boundaries) < 2.5
                assert off == pytest.approx(100 * (printed / N - 1), abs=0.11)


def test_systems_of_the_study_of_scripts_have_targets_for_equal_chunks(tmp_path):
    """Calibrated targets; those of one predictor act through losses only."""
    lines = {k: [line.encode() for line in LINES[k]] for k in ("eng", "rus")}
    config = fairness_table.FairnessTableConfig(("eng=x",), systems=tuple(fairness_table.SYSTEMS))
    runs = fairness_table.run_configs(config, lines, tmp_path)
    cuts = [run.model.stages[0].chunking for run in runs]
    chunks = calibrate.calibrate(lines, 6.0, ()).target_ratios
    losses = [["ratio"], ["ratio"], ["ratio", "parity"], ["hinge"], ["binomial"]]
    assert [[loss.name for loss in cut.losses] for cut in cuts] == losses
    assert [cut.target_ratios == chunks for cut in cuts] == [True, False, True, True, True]
    assert [cut.num_predictors for cut in cuts] == [len(chunks), 1, 1, 1, len(chunks)]
    assert [cut.hold_rate for cut in cuts] == [True, True, False, False, False]
    drawn = [cut.predictor.name == "mlp" for cut in cuts]  # in evaluation too, as in their code
    assert drawn == [False, False, False, True, True]
    assert all(cut.predictor.reference_noise_at_evaluation for cut in cuts[3:])
    assert len({run.data for run in runs}) == 1 and runs[2].workdir == str(tmp_path / "parity")


@pytest.mark.every
def test_fairness_table_from_text_to_reports(files, tmp_path, monkeypatch, capsys):
    """Two texts of three languages, of mixed scripts; both models; a second call trains nothing."""
    single = held_run(tmp_path)
    monkeypatch.setattr(mixed_scripts_single, "config", lambda: single)
    monkeypatch.setattr(mixed_scripts_routed, "config", lambda: single)
    monkeypatch.setattr(loop, "build", build)
    out = tmp_path / "fair"
    both = [files["eng"], files["rus"], files["jpn"]] * 2
    argv = [
        "--train", *both, "--unseen", files["hin"], "--heldout", 3, "--bpe", 300, "--out", out,
        "--mean-ratio", 5,
    ]  # fmt: skip
    assert call(monkeypatch, fairness_table, *argv) == 0
    shown = capsys.readouterr().out
    routed, twin = (read_config(out / name) for name in ("routed", "single"))
    check_rates(shown, routed)
    assert routed.data == twin.data and routed.rate_control.fit_default
    assert routed.train == twin.train and routed.seed == twin.seed
    assert twin.model.num_routes == 1 and twin.model.stages[0].chunking.target_ratio == 5
    assert routed.model.route_names[0] == "default" and routed.model.num_routes > 3
    logged, names = rows(routed)[-1], routed.model.route_names
    assert sum(logged[f"stage0/route_{name}/boundary_rate"] > 0 for name in names) > 3
    offsets = load(out / "routed").backbone.boundary_offset[...]
    assert abs(offsets).max() > 0.1
    names = ["bytes", "BPE 300", "routed", "single"]
    for part, seen, unseen in [("heldout", 6, []), ("heldout-1", 3, []), ("heldout-2", 3, ["hin"])]:
        content = json.loads((out / part / "report.json").read_text())
        assert [system["name"] for system in content["systems"]] == names
        assert content["unseen"] == unseen
        for system in content["systems"]:
            assert {*system["languages"]} == {"eng", "rus", "jpn", *unseen}
            assert all(own["sentences"] == seen for own in system["languages"].values())
    held, trained = (
        [json.loads(line)["text"] for line in (out / "text" / name).read_text().splitlines()]
        for name in ("heldout.jpn.jsonl", "train.jpn.jsonl")
    )
    assert held == ["\n".join([LINES["jpn"][i] for i in (0, 3, 7)] * 2)]
    assert sorted("\n".join(trained + held).split("\n")) == sorted(LINES["jpn"] * 2)

    before = {path: path.read_bytes() for path in out.rglob("report.json")}
    assert call(monkeypatch, fairness_table, *argv) == 0
    assert before == {path: path.read_bytes() for path in out.rglob("report.json")}
    for changes, says in [
        (["--heldout", 4], "heldout=4, but the study in out='.*' has 3: use that"),
        (["--heldout", 11], "heldout=11 of 11 lines"),
        (["--train", files["eng"], files["rus"], files["eng"]], "give the same languages"),
        (["--unseen", files["eng"]], "unseen='eng' is in train too"),
        (["--systems", "maget"], "systems='maget' is unknown: use some of routed, single"),
    ]:
        with pytest.raises(ConfigError, match=says):
            call(monkeypatch, fairness_table, *argv, *changes)
    text = tmp_path / "eng.txt"
    text.write_text(text.read_text().replace("e", "i"))
    with pytest.raises(ConfigError, match="holds other text"):
        call(monkeypatch, fairness_table, *argv)


@pytest.mark.every
def test_controller_table_holds_the_rate_that_a_fixed_weight_had(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "build", build)
    monkeypatch.setattr(mixed_scripts_single, "config", lambda: held_run(tmp_path))
    assert call(monkeypatch, controller_table, "--workdir", tmp_path) == 0
    fixed, held = (read_config(tmp_path / name) for name in ("fixed", "held"))
    of = lambda config: config.model.stages[0].chunking
    assert not of(fixed).hold_rate and of(held).hold_rate and of(fixed).target_ratio == 3
    achieved = rows(fixed)[-1]["eval/stage0/bytes_per_chunk"]
    assert of(held).target_ratio == pytest.approx(achieved, abs=1e-4)
    first, second = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert first[:4] == ["fixed", "0", "3.000", f"{achieved:.3f}"]
    assert second[:3] == ["held", "0", f"{achieved:.3f}"]
    assert [first[5], second[5]] == [f"{rows(c)[-1]['eval/bpb']:.4f}" for c in (fixed, held)]
    with pytest.raises(ConfigError, match="use a model with one route"):
        call(monkeypatch, controller_table, "mixed_scripts_routed")


@pytest.mark.every
def test_benchmark_routing_compares_both(monkeypatch, capsys, tmp_path):
    timed = []

    def noted(config):
        timed.append((config.model.num_routes, config.data.batch_size))
        return build(config)

    def noted_call(stage, fed, mesh, routes):
        ids_BL = fed["route_ids"]
        timed.append((stage.chunking.routes, len(ids_BL), len(np.unique(ids_BL))))
        return router_call(stage, fed, mesh, routes)

    router_call = benchmark_routing.router_call
    monkeypatch.setattr(benchmark_routing, "base_config", lambda name: tiny_run(tmp_path))
    monkeypatch.setattr(benchmark_routing, "build", noted)
    monkeypatch.setattr(benchmark_routing, "router_call", noted_call)
    call(monkeypatch, benchmark_routing, "--routes", 3, "--repeats", 1, "--rows", 16, "--run", 8)
    assert timed == [(1, 16), (1, 16, 1), (3, 16), (3, 16, 3)]
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["what", "1", "route", "3", "routes", "ratio"]
    for what, line in zip(("router", "training step"), map(str.strip, rows), strict=True):
        assert line.startswith(what)
        one, _, many, _, ratio = line.removeprefix(what).split()
        assert float(ratio) == pytest.approx(float(many) / float(one), rel=0.1)
    with pytest.raises(ConfigError, match="routes=1: use 2 to 1000"):
        call(monkeypatch, benchmark_routing, "--routes", 1)
