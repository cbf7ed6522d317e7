"""Comparisons: widths at a cost, rates, tables, and whole runs of two systems."""

import json
import math
import random
import shlex
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.compare import match, measure, systems, worker
from experiments.compare.__main__ import main
from experiments.compare.counts import counts_bpb, same_share
from experiments.compare.measure import chunk_sizes, is_utf8
from experiments.compare.report import grouped, markdown, page, tables
from experiments.compare.settings import Compare
from hnet.command_line import parse
from hnet.config import HNetConfig
from hnet.data import DataConfig, open_corpus
from hnet.errors import ConfigError
from hnet.inspect.fairness import cut_at
from hnet.train.lock import DirectoryLock
from hnet.train.metrics_file import read_metrics
from hnet.train.named import base_config, run_config
from hnet.train.workdir import read_config
from tests.training import ATTENTION, run, segmenter_once

pytestmark = pytest.mark.usefixtures("quick_compilation")
MINI = f"{__name__}:mini"


def mini() -> HNetConfig:
    return ATTENTION


# --- widths and rates -----------------------------------------------------------------------------


def size(model: HNetConfig) -> float:
    """A cost that grows with every width."""
    return sum(s.d_model**2 + s.d_model * s.d_mlp for s in model.stages)


@pytest.mark.parametrize("name", ["hnet", "bytes_mamba2", "2stage_L"])
def test_the_network_at_a_cost_is_the_nearest_of_all_widths(name):
    model, budget = base_config(name).model, 210_000
    found, cost = match.at_cost(model, size, budget)
    assert cost == size(found) and abs(cost / budget - 1) < 0.05
    off = [abs(math.log(size(each) / budget)) for each in match.sizes(model)]
    assert abs(math.log(cost / budget)) <= min(off)
    for new, old in zip(found.stages, model.stages):
        assert new.arch_layout == old.arch_layout and new.chunking == old.chunking
        assert new.d_model / old.d_model == pytest.approx(
            found.stages[-1].d_model / model.stages[-1].d_model, rel=0.2
        )
    for few in (1, 10**12):
        with pytest.raises(ConfigError, match="nearest width, .* choose another size"):
            match.at_cost(model, size, few)


def test_rates_are_targets_of_the_scripts_or_counts_of_a_rule():
    texts = [b"some words of English text", "слово".encode() * 3]
    expected_rates = partial(match.expected_rates, bos=True)
    rates = expected_rates(base_config("magnet").model, texts)
    # The first byte of the second text completes no character, so it has the default route.
    assert rates == pytest.approx([(27 / 5 + 29 / 10) / 56])
    assert expected_rates(base_config("dtp_fixed").model, texts) == (0.25,)
    texts = [b"a b  c de fgh", b"no, end. "]
    spaces = [cut_at(t, [i + 1 for i, c in enumerate(t) if c == 32]) for t in texts]
    counted = sum(len(seg.stages[0].starts) for seg in spaces) / sum(map(len, texts))
    assert expected_rates(base_config("dtp_whitespace").model, texts) == (counted,)


@pytest.mark.few("bos", [False], [True, False])
def test_rates_are_counted_with_the_bos_of_the_runs(bos, monkeypatch):
    asked = []

    def segmenter(graph, config, *, bos):
        asked.append(bos)
        return match_segmenter(graph, config, bos=bos)

    match_segmenter = match.segmenter
    monkeypatch.setattr(match, "segmenter", segmenter)
    monkeypatch.setattr(systems, "texts_of", lambda corpus: [b"a b  c de fgh"])
    monkeypatch.setattr(systems, "flops_per_byte", lambda config, *_: size(config.model))
    settings = Compare(data=DataConfig(bos_eos=bos), reference="dtp_whitespace")
    costs = systems.Costs(settings, corpus=None)
    costs.system("dtp_whitespace", costs.budget(), None)
    assert asked == [bos, bos]


def test_flops_per_byte_are_of_source_bytes_at_the_rate(monkeypatch):
    asked = {}

    def flops(model, lengths, rows_sharing_slots):
        asked.update(lengths=lengths, rows_sharing_slots=rows_sharing_slots)
        return {}

    monkeypatch.setattr(match, "training_flops", flops)
    monkeypatch.setattr(match, "total", lambda parts: 960.0)
    config = base_config("hnet")
    config = replace(config, data=replace(config.data, seq_len=48, batch_size=12))
    assert match.flops_per_byte(config, (0.25,), 4.0) == 960 / (48 * 4)
    assert asked == {"lengths": (48, 12.0), "rows_sharing_slots": 4}


def test_measured_seconds_can_be_matched(monkeypatch):
    costs = systems.Costs(Compare(match="bytes_per_second"), corpus=None)
    monkeypatch.setattr(
        systems, "seconds_per_byte", lambda config, rates, corpus, size: 7.0 * rates[0] / size
    )
    assert costs.of(base_config("hnet"), (0.5,), 2.0) == 1.75
    costs = systems.Costs(Compare(match="parameters"), corpus=None)
    assert costs.of(base_config("tiny"), (0.5,), 1.0) == match.parameters(base_config("tiny").model)


@pytest.mark.parametrize("name", ["hnet", "flexitokens", "dtp_entropy", "mixed_scripts_routed"])
def test_a_command_gives_the_configuration_it_was_made_from(name):
    settings = Compare(bytes=99_999)
    settings = replace(settings, data=replace(settings.data, files=("a b*.txt", "c.txt")))
    config = systems.common(settings, name)
    model = match.sizes(config.model)[9]
    config = replace(config, model=model, seed=3, workdir="runs/it's here")
    assert run_config(shlex.split(systems.command(config, name))[3:]) == config
    assert config.train.steps == 99_999 // (8 * 512)


# --- tables ---------------------------------------------------------------------------------------


def row(name, seed, bpb, **fields):
    f1 = {"f1": 0.5, "random": 0.25, "stride": 0.125}
    return {
        "system": name, "seed": seed, "bpb": bpb, "parameters": 1234, "widths": [8, 16],
        "flops_per_byte": 2_500_000.0, "train_bytes": 4096, "train_bytes_per_sec": 1000.0,
        "decode_bytes_per_sec": 50.0, "valid_utf8": 0.75, "sample": "<b>\x1b[1m", "gold": {},
        "chunks": [{"mean": 4.0, "p10": 1.0, "p50": 4.0, "p90": 7.0, "cv": 0.5}],
        "rates": [{"wanted": 6.0, "achieved": 5.5}], "overflow": [0.015],
        "agreement": {"whitespace": [f1], "words": [f1]}, "command": f"run {name} </pre>",
    } | fields  # fmt: skip


def test_cells_are_means_over_seeds_with_the_interval_of_student():
    from scipy.stats import t

    plain = {"chunks": [], "rates": [], "overflow": [], "agreement": {}, "widths": [9],
             "decode_bytes_per_sec": None, "valid_utf8": None, "sample": None}  # fmt: skip
    gold = {"g|.jsonl": {"words": [{"f1": 0.5, "random": 0.25, "stride": 0.0}]}}
    rows = [row("b", 0, 2.5, **plain), row("<a>|$x$", 1, 2.0, gold=gold), row("<a>|$x$", 0, 2.1)]
    half = t.ppf(0.975, 1) * math.sqrt(0.005) / math.sqrt(2)
    found = tables(grouped(rows))
    quality, chunks, golden = found.values()
    assert quality[1] == ["<a>|$x$", "2", f"2.0500 ± {half:.4f}", "1,234", "8, 16", "2.500",
                          "4,096", "1,000", "50", "75%"]  # fmt: skip
    assert quality[2][:3] == ["b", "1", "2.5000"] and quality[2][-2:] == ["-", "-"]
    assert chunks[1] == ["<a>|$x$", "4.00", "1 / 4 / 7", "0.50", "6.00", "5.50", "1.5%",
                         "0.50 / 0.25 / 0.12", "0.50 / 0.25 / 0.12"]  # fmt: skip
    assert chunks[2] == ["b", *["-"] * 8]
    assert golden == [["system", "words in g|.jsonl"], ["<a>|$x$", "0.50 / 0.25 / 0.00"],
                      ["b", "-"]]  # fmt: skip
    outer, inner = ({"f1": n, "random": n, "stride": n} for n in (0.5, 0.75))
    two = {
        "rates": [{"wanted": None, "achieved": 2}, {"wanted": 3, "achieved": 4}],
        "agreement": {"whitespace": [outer, inner]},
    }
    found = tables(grouped([row("c", 0, 1.0, **two)]))["Chunks"][1]
    assert found[4:6] == ["-, 3.00", "2.00, 4.00"] and found[7:] == ["0.75 / 0.75 / 0.75", "-"]


def test_pages_escape_names_and_samples(tmp_path):
    by_system = grouped([row("<a>|$x$", 0, 2.0), row("b", 0, 2.5)])
    facts = {"machine": "<i>|"}
    html = page(by_system, facts, {"x.png": b"\x89P"})
    assert "&lt;a&gt;|$x$" in html and "<a>" not in html and "&lt;b&gt;\\u{001b}[1m" in html
    assert "&lt;i&gt;" in html and "run b &lt;/pre&gt;</pre>" in html
    assert 'src="data:image/png;base64,iVA="' in html and "http" not in html
    text = markdown(by_system, facts)
    assert "| &lt;a&gt;\\|$x$ | 1 | 2.0000 |" in text and "\nrun b </pre>\n" in text
    worker.write_report(tmp_path, [row("<a>|$x$", 0, 2.0)], facts)
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["bpb"] == 2.0
    assert (tmp_path / "bpb_flops.png").read_bytes().startswith(b"\x89PNG")


def test_chunk_sizes_and_valid_utf8():
    found = chunk_sizes([cut_at(b"abcdefghij", [1, 3, 6]), cut_at(b"xy", [])], 0)
    sizes = [1, 2, 3, 4, 2]
    assert found == {
        "mean": 2.4, "p10": np.percentile(sizes, 10), "p50": 2, "p90": np.percentile(sizes, 90),
        "cv": np.std(sizes) / 2.4,
    }  # fmt: skip
    cases = {b"": 1, "aé".encode(): 1, "aé".encode()[:-1]: 1, b"a\xff": 0, b"\xc3a": 0}
    assert [is_utf8(data) for data in cases] == [bool(valid) for valid in cases.values()]


# --- whole runs -----------------------------------------------------------------------------------


class Stop:
    """A stop request as soon as a file matches a pattern."""

    pattern = ""

    def __enter__(self):
        return self

    def __exit__(self, *exc_info): ...

    def stop_requested(self, step):
        return bool(self.pattern and list(Path().glob(self.pattern)))


SMALL = [
    "--data.files", "synthetic:latin", "--data.seq_len", "32", "--data.eval_max_bytes", "600",
    "--reference", MINI, "--reference_parameters", "15000", "--bytes", "800", "--seeds", "2",
    "--vocabulary", "280", "--passages", "4", "--passage_bytes", "60", "--samples", "2",
    "--gold", "gold.jsonl", "--workdir", "w", "--train.log_every", "1", "--match", "parameters",
]  # fmt: skip


def generated(model, prompts, sampling, *, bos, batch_size):
    """Continuations of half of the prompts are no UTF-8."""
    assert bos and batch_size == len(prompts) == 2 and sampling.max_bytes == 64
    return [SimpleNamespace(data=data) for data in (b"ok", b"\xff")]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison that was stopped and resumed, exit codes and trained systems."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "gold.jsonl").write_text('{"id": "1", "text": "ab cd", "spans": [[0, 2], [3, 5]]}\n')
    codes, trained = [], []
    train = worker.train_system

    def recorded(system, *arguments):
        trained.append(system.name)
        return train(system, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(worker, "StopRequest", Stop)
        patch.setattr(worker, "enable_compilation_cache", lambda: None)
        patch.setattr(worker, "train_system", recorded)
        patch.setattr(measure, "generate", generated)
        patch.setattr(measure, "segmenter", segmenter_once)
        patch.setattr(Stop, "pattern", "w/*/seed1/row.json")
        codes.append(main([MINI, "bpe", *SMALL]))
        patch.setattr(Stop, "pattern", "")
        codes.append(main([MINI, "bpe", *SMALL]))
    return folder, codes, trained


def test_a_stopped_comparison_resumes_and_finished_systems_are_read(compared):
    folder, codes, trained = compared
    assert codes == [75, 0] and trained == [MINI, "bpe"]
    own = folder / "w" / systems.folder_name(MINI)
    assert [r["step"] for r in read_metrics(own / "together")] == [1, 2, 3]
    content = json.loads((folder / "w" / "results.json").read_text())
    assert sorted((r["system"], r["seed"]) for r in content["rows"]) == [
        ("bpe", 0), ("bpe", 1), (MINI, 0), (MINI, 1)
    ]  # fmt: skip
    first, token = (next(r for r in content["rows"] if r["system"] == s) for s in (MINI, "bpe"))
    assert first["rates"][0]["wanted"] == 3.0 and first["gold"]["gold.jsonl"]["words"][0]["f1"] >= 0
    assert first["rates"][0]["achieved"] == pytest.approx(first["bytes_per_chunk"][0])
    assert first["train_bytes"] == 3 * 8 * 32 and first["train_bytes_per_sec"] > 0
    assert first["decode_bytes_per_sec"] > 0 and first["valid_utf8"] == 0.5
    assert token["train_bytes"] == pytest.approx(3 * 8 * 32, rel=0.4)
    assert token["decode_bytes_per_sec"] is None and token["chunks"][0]["mean"] > 1
    assert first["heldout_bytes"] == token["heldout_bytes"] == 600
    assert [abs(r["parameters"] / 15_000 - 1) < 0.2 for r in (first, token)] == [True] * 2


def test_the_command_of_a_row_reproduces_it(compared, monkeypatch, tmp_path, request):
    monkeypatch.chdir(compared[0])
    stored = json.loads(Path("w", systems.folder_name(MINI), "seed1", "row.json").read_text())
    config = run_config(shlex.split(stored["command"])[3:])
    assert config.seed == 1 and "seed1" in config.workdir
    kept = read_config(Path("w", systems.folder_name(MINI), "seed1"))
    assert replace(kept, workdir="runs") == replace(config, workdir="runs")
    if request.config.getoption("every"):  # tests/train/test_parallel_runs.py compares other runs
        config = replace(config, workdir=str(tmp_path / "again"))
        outcome = run(config, devices=jax.devices()[:1])
        assert outcome.evaluation.bpb == pytest.approx(stored["bpb"], rel=1e-4)


def test_another_comparison_or_text_is_refused_and_a_held_system_is_skipped(compared, monkeypatch):
    monkeypatch.chdir(compared[0])
    monkeypatch.setattr(worker, "IDLE_SECONDS", 0.0)
    before = sorted(Path("w").rglob("*"))
    for words, says in (
        (["--seeds", "3"], "holds another comparison: seeds is 2 there, here 3"),
        (["--data.eval_max_bytes", "700"], "another comparison: data.eval_max_bytes"),
    ):
        with pytest.raises(ConfigError, match=says):
            main([MINI, *SMALL, *words])
    assert sorted(Path("w").rglob("*")) == before
    gold, system = Path("gold.jsonl"), Path("w", systems.folder_name(MINI), "system.json")
    for file, old, new, says in (
        (gold, "[3, 5]", "[3, 4]", "^gold: the content has fingerprint .*, but the comparison in"),
        (system, '"source": "', '"source": "x', f"^system '{MINI}': the content has fingerprint"),
        (system, f'"name": "{MINI}', '"name": "other', "has the folder of 'other"),
        (system, '"rates"', '"rate"', "system '.*' is damaged: restore or remove it"),
        (Path("w", "comparison.json"), '"budget"', '"b"', "comparison.json' is damaged"),
    ):
        content = file.read_text()
        assert old in content
        file.write_text(content.replace(old, new))
        with pytest.raises(ConfigError, match=says):
            main([MINI, *SMALL])
        file.write_text(content)
    with pytest.raises(ConfigError, match="have one folder: rename a file"):
        main(["a/b.json", "a_b.json", *SMALL])
    mine = worker.Comparison([MINI], parse(Compare, Compare(), SMALL))
    system = systems.System.from_json(
        json.loads(Path("w", systems.folder_name(MINI), "system.json").read_text())
    )
    mine.seeds, asked = range(7, 9), []
    monkeypatch.setattr(mine, "_train", lambda *arguments: asked.append("trained"))
    stop = Stop()
    stop.stop_requested = lambda step: asked.append("stop?") or len(asked) > 3
    with DirectoryLock(Path("w") / system.folder_name):
        assert not mine._work([system], stop)
    assert asked == ["stop?"] * 4
    assert not mine._work([system], Stop()) and asked[4:] == ["trained"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["hnett"], "configuration 'hnett' is unknown: did you mean hnet"),
        (["hnet", "hnet"], "system 'hnet' is named twice"),
        (["hnet", "--reference", "x1"], "configuration 'x1' is unknown"),
        (["hnet", "--size", "huge"], "size='huge': use one of tiny, small, base"),
        (["hnet", "--match", "time"], "match='time': use one of"),
        (["hnet", "--model.vocab_size", "9"], "unknown field model"),
        (["hnet", "--gold", "none.py"], "none.py.*No such file"),
        (["hnet", "--data.files", "none*.txt"], "none.*txt"),
        (["hnet", "--data.eval_fraction", "0"], "no held-out text: give --data.eval_files"),
        (["hnet", "--workdir", "gs://b/c"], "workdir='gs://b/c' is no local path"),
        ([], "holds no comparison: name systems"),
        (["hnet", "--reference_parameters", "1000"], "choose another size"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "enable_compilation_cache", lambda: None)
    with pytest.raises(ConfigError, match=says) as error:
        main([*words, *(["--data.files", "synthetic:latin"] * ("--data.files" not in words))])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_folder_with_other_results_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "enable_compilation_cache", lambda: None)
    Path("RESULTS.md").write_text("mine")
    with pytest.raises(ConfigError, match="no comparison wrote its RESULTS.md: choose another"):
        main(["hnet", "--workdir", ".", "--data.files", "synthetic:latin"])
    assert [p.name for p in Path().iterdir()] == ["RESULTS.md"]


@pytest.mark.parametrize("most, lengths", [(60, (15, 44)), (7, (1, 5)), (1000, (31, 89))])
def test_counted_text_has_the_same_share_of_each_document(tmp_path, most, lengths):
    texts = b"a" * 31, b"b" * 89
    for name, text in zip("xy", texts):
        (tmp_path / name).write_bytes(text)
    corpus = open_corpus(
        DataConfig((str(tmp_path / "x"), str(tmp_path / "y")), eval_fraction=0, seq_len=8)
    )
    found = same_share(corpus.train, most)
    assert found == [text[:n] for text, n in zip(texts, lengths)]


@pytest.mark.parametrize("order", [0, 1, 3])
def test_counts_are_those_of_a_loop(order):
    rng = random.Random(order)
    train = [bytes(rng.choices(b"abc ", k=61)), b"", bytes(rng.choices(b"abd", k=13))]
    heldout = [bytes(rng.choices(b"abce", k=37)), b"zz"]
    before = lambda text, at, k: (bytes(k) + text)[at : at + k]
    bits = []
    for text in heldout:
        for i, byte in enumerate(text):
            prob = 1 / 256
            for k in range(order + 1):
                own = before(text, i, k)
                places = ((t, j) for t in train for j in range(len(t)))
                after = Counter(t[j] for t, j in places if before(t, j, k) == own)
                if after:
                    prob = (after[byte] + len(after) * prob) / (after.total() + len(after))
            bits.append(-math.log2(prob))
    assert counts_bpb(train, heldout, order) == pytest.approx(sum(bits) / len(bits), rel=1e-12)
