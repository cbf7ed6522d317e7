"""The ladder against published models and its stated match; the fit against known curves."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments.scaling import __main__ as scaling
from experiments.scaling.fit import fit
from experiments.scaling.ladder import FAMILIES, make_points, peak_learning_rate
from hnet.command_line import FAILED
from hnet.config import PUBLISHED
from hnet.data import DataConfig
from hnet.data.identity import write_inputs
from hnet.errors import ConfigError
from hnet.runtime.distributed import REQUEUE_EXIT_CODE
from hnet.train.named import run_config
from tests.training import tiny_run

LEVELS = (128, 256, 512, 1024, 1536, 2048)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    data = DataConfig(("synthetic:latin",), batch_size=256, seq_len=8192)
    return tiny_run(tmp_path_factory.mktemp("scaling"), data=data)


@pytest.fixture(scope="module")
def ladder(base):
    points = make_points(base, LEVELS, FAMILIES, bytes_per_parameter=90.0)
    return {(point.family, point.level): (point, model) for point, model in points}


def test_every_model_of_a_level_costs_the_same_a_byte_and_sees_the_same_bytes(ladder):
    for level in LEVELS:
        points = [ladder[family, level][0] for family in FAMILIES]
        assert max(abs(p.mismatch) for p in points) < 0.06
        assert len({p.train_bytes for p in points}) == 1
        for p in points:
            assert p.train_bytes == p.steps * 256 * 8192
            assert p.train_flops == pytest.approx(3 * p.flops_per_byte * p.train_bytes)
    sizes = [ladder["hnet1", level][0].parameters for level in LEVELS]
    assert sizes == sorted(sizes)


def test_the_rules_lead_to_the_published_models(ladder):
    """L and XL: GFLOPs per byte .42 and .69; widths, encoders and depth of the main network."""
    assert ladder["bpe", 1536][0].flops_per_byte == pytest.approx(0.423e9, rel=2e-3)
    assert ladder["bpe", 2048][0].flops_per_byte == pytest.approx(0.699e9, rel=2e-3)
    for name, place in (("1stage_L", ("hnet1", 1536)), ("1stage_XL", ("hnet1", 2048)),
                        ("2stage_L", ("hnet2", 1536)), ("2stage_XL", ("hnet2", 2048))):  # fmt: skip
        point, model = ladder[place]
        published = PUBLISHED[name]
        assert [s.d_model for s in model.stages] == [s.d_model for s in published.stages]
        assert [s.d_mlp for s in model.stages] == [s.d_mlp for s in published.stages]
        assert model.stages[:-1] == published.stages[:-1]
        assert abs(point.layers - int(published.stages[-1].arch_layout[0][1:])) <= 1
    assert peak_learning_rate(1536) == 6.25e-4
    assert peak_learning_rate(2048) == pytest.approx(5e-4)


@pytest.mark.parametrize("noise", [0.0, 0.004])
def test_the_fit_recovers_a_planted_curve(noise):
    C = np.geomspace(1e15, 1e20, 9)
    unit = np.exp(np.log(C).mean())
    rng = np.random.default_rng(1)
    bpb = 0.7 + 0.4 * (C / unit) ** -0.11 + noise * rng.normal(size=len(C))
    curve = fit(C, bpb)
    for name, planted in (("a", 0.7), ("b", 0.4), ("c", 0.11)):
        if not noise:
            assert getattr(curve, name) == pytest.approx(planted, rel=2e-3)
        low, high = curve.intervals[name]
        assert low - 1e-4 <= planted <= high + 1e-4
    assert not fit(C[::3], bpb[::3]).intervals
    with pytest.raises(ConfigError, match="needs three sizes: 2 are done"):
        fit(C[:2], bpb[:2])


def test_a_plan_is_written_before_anything_runs_and_never_over_another(tmp_path, capsys):
    out = str(tmp_path / "out")
    argv = ["plan", "--out", out, "--levels", "64", "128", "--bpe", "300"]
    small = ["--data.files", "synthetic:latin", "--data.seq_len", "64", "--data.batch_size", "4"]
    assert scaling.main([*argv, *small]) == 0
    rows = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [row["name"] for row in rows][:4] == ["bpe-64", "bytes-64", "hnet1-64", "hnet2-64"]
    for row in rows:
        config = run_config([f"{out}/configs/{row['name']}.json"])
        assert config.train.steps == row["steps"] and row["memory"] > 16 * row["parameters"]
        assert config.optim.learning_rate == row["learning_rate"]
    bpe = run_config([f"{out}/configs/bpe-64.json"])
    assert bpe.data.tokenizer == f"{out}/tokenizer.json" and bpe.model.vocab_size == 300
    assert bpe.data.seq_len == round(64 / rows[0]["bytes_per_token"]) < 64
    with pytest.raises(ConfigError, match="plan.json.* exists: choose another name"):
        scaling.main([*argv, *small])
    with pytest.raises(ConfigError, match="only=.*the plan has bpe-64, bytes-64"):
        scaling.main(["run", "--out", out, "--only", "bpe-65"])
    with pytest.raises(ConfigError, match="no model of .* is trained"):
        scaling.main(["fit", "--out", out])
    with pytest.raises(ConfigError, match="plan.json: .*make it with `plan`"):
        scaling.main(["fit", "--out", str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="levels=.* use widths from 64 on"):
        scaling.main(["plan", "--out", str(tmp_path / "o"), "--levels", "65", *small])


def test_finished_models_are_fitted_and_drawn(tmp_path, capsys):
    out = tmp_path / "out"
    small = ["--data.files", "synthetic:latin", "--data.seq_len", "64"]
    levels = ["--levels", "64", "96", "128", "192", "256"]
    assert scaling.main(["plan", "--out", str(out), *levels, "--families", "bytes", *small]) == 0
    for row in json.loads((out / "plan.json").read_text()):
        folder = out / "runs" / row["name"]
        folder.mkdir(parents=True)
        end = {"step": row["steps"], "eval/bpb": 1 + 9e3 * row["train_flops"] ** -0.3}
        (folder / "metrics.jsonl").write_text(json.dumps(end) + "\n")
    assert scaling.main(["fit", "--out", str(out)]) == 0
    found = json.loads((out / "fit.json").read_text())
    assert found["curves"]["bytes"]["a"] == pytest.approx(1, abs=0.01)
    assert found["curves"]["bytes"]["c"] == pytest.approx(0.3, abs=0.01)
    for level, text in ((64, "aa"), (96, "aa"), (128, "bb")):
        write_inputs(out / "runs" / f"bytes-{level}", {"data.files": text, "data.tokenizer": "cc"})
    with pytest.raises(ConfigError, match="fingerprint bb, but model bytes-64 read aa: train all"):
        scaling.main(["fit", "--out", str(out)])
    assert (out / "scaling.png").stat().st_size and "bytes-256" in capsys.readouterr().out


def test_models_are_trained_in_turn_past_one_that_fails_and_up_to_a_stop(tmp_path, monkeypatch):
    out, ends, trained = tmp_path / "out", {}, []
    small = ["--data.files", "synthetic:latin", "--data.seq_len", "64"]
    levels = ["--levels", "64", "96", "128", "192"]
    assert scaling.main(["plan", "--out", str(out), *levels, "--families", "bytes", *small]) == 0

    def train_to_end(config):
        name = config.workdir.split("/")[-1]
        trained.append(name)
        if name not in ends:
            folder = out / "runs" / name
            folder.mkdir(parents=True)
            end = {"step": config.train.steps, "eval/bpb": 2.0}
            (folder / "metrics.jsonl").write_text(json.dumps(end) + "\n")
        return ends.get(name)

    monkeypatch.setattr(scaling, "train_to_end", train_to_end)
    monkeypatch.setattr(scaling, "enable_compilation_cache", lambda: None)
    ends |= {"bytes-64": FAILED, "bytes-128": REQUEUE_EXIT_CODE}
    assert scaling.main(["run", "--out", str(out)]) == REQUEUE_EXIT_CODE
    assert trained == ["bytes-64", "bytes-96", "bytes-128"]
    del ends["bytes-128"]
    assert scaling.main(["run", "--out", str(out)]) == FAILED
    assert trained[3:] == ["bytes-64", "bytes-128", "bytes-192"]
    ends.clear()
    write_inputs(out / "runs" / "bytes-96", {"data.files": "aa"})
    with pytest.raises(ConfigError, match="but model bytes-96 read aa: train all models on one"):
        scaling.main(["run", "--out", str(out)])
    (out / "runs" / "bytes-96" / "inputs.json").unlink()
    assert scaling.main(["run", "--out", str(out)]) == 0
    assert trained[6:] == ["bytes-64"]


def test_a_row_of_tokens_holds_as_many_bytes_as_one_of_bytes(base, ladder):
    assert ladder["bpe", 512][0].seq_len == 1792 and ladder["bytes", 512][0].seq_len == 8192
    deeper = replace(base, data=replace(base.data, seq_len=1024))
    ((point, _),) = make_points(deeper, (512,), ("bpe",), bytes_per_parameter=90.0)
    assert point.seq_len == 224
