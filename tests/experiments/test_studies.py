"""Programs of the studies: slots, rates, claims."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from scipy import stats

from experiments import claims as claimed
from experiments import rates
from experiments.claims import __main__ as claims
from experiments.compare import __main__ as compare
from experiments.finetune import __main__ as finetune
from experiments.rates.__main__ import main as rates_main
from experiments.scripts import __main__ as scripts
from experiments.slots import __main__ as slots
from hnet.chunking.boundaries import Prediction, decide
from hnet.chunking.dechunks.ema import EMA
from hnet.chunking.slots import open_slots
from hnet.data import open_corpus
from hnet.errors import ConfigError
from hnet.nn.context import Context
from hnet.train.named import base_config
from hnet.train.workdir import claim_workdir, run_inputs
from tests.training import ATTENTION, build, tiny_run

pytestmark = pytest.mark.usefixtures("quick_compilation")


# --- claims ---------------------------------------------------------------------------------------


def test_a_difference_has_the_interval_of_welch():
    better, worse = [2.9, 3.0, 2.95], [3.1, 3.3, 3.15, 3.2]
    off, half = claims.difference(better, worse)
    expected = stats.ttest_ind(better, worse, equal_var=False).confidence_interval()
    assert (off - half, off + half) == pytest.approx((expected.low, expected.high))
    assert claims.difference([2.0], worse) == (pytest.approx(2.0 - 3.1875), math.inf)
    assert claims.difference([2.0, 2.0], [3.0, 3.0]) == (-1, 0)
    verdicts = [claims.verdict(*pair) for pair in [(-2, 1), (2, 1), (-1, 2), (-1, math.inf)]]
    assert claims.percentage([50.0, 52.0, 54.0]) == "52 ± 5"  # 4.303 * 2 / sqrt(3)
    assert claims.percentage([50.0, None]) == "-" and claims.percentage([7.4]) == "7 ± 0"
    unsure = "cannot tell at this size"
    assert verdicts == ["holds", "does not hold", unsure, unsure]


def row(system, seed, bpb):
    return {"system": system, "seed": seed, "bpb": bpb, "parameters": 1e6, "train_bytes": 2e6}


def test_claims_are_judged_from_the_rows_of_a_comparison(tmp_path, capsys):
    with pytest.raises(ConfigError, match="holds no finished run"):
        claims.main(["--report", "--workdir", str(tmp_path)])
    found = [row("hnet", n, 3 + n / 100) for n in (0, 1)]
    found += [row("bytes_transformer", n, 4 + n / 100) for n in (0, 1)]
    for each in found:
        path = tmp_path / each["system"] / f"seed{each['seed']}" / "row.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(each))
    assert claims.main(["--report", "--workdir", str(tmp_path)]) == 0
    text = (tmp_path / "CLAIMS.md").read_text()
    first, second = text.splitlines()[4:6]
    assert first.endswith("| 3.005 against 4.005 (-1.000 ± 0.030) | holds |")
    assert "| 1.00M and 1.00M parameters, 2.00 MB, 2 and 2 seeds |" in first
    assert (
        second.endswith("| not run | not run | not run |")
        and text.strip() in capsys.readouterr().out
    )


def test_networks_of_claims_differ_from_hnet_as_they_say():
    named = {claim.better for claim in claims.CLAIMS} | {claim.worse for claim in claims.CLAIMS}
    assert named <= set(claims.NAMES)
    outer = base_config("hnet").model.stages[0]
    models = [base_config(name).model for name in claims.NAMES if ":" in name]
    assert [m.num_chunked for m in models] == [2, 1, 1, 1] and claimed.two_stages() == models[0]
    assert math.prod(s.chunking.target_ratio for s in models[0].stages[:-1]) == 6
    for model in models[1:3]:
        cut = model.stages[0].chunking
        assert replace(cut, dechunk="ema") == outer.chunking and cut.dechunk.part is not EMA
    assert replace(models[3].stages[0], arch_layout=outer.arch_layout) == outer


def test_ablated_dechunks_lack_one_path_of_the_gradient_each():
    p_BL, y_BMD = jnp.array([[1.0, 0.2, 0.7, 0.4, 0.6]]), jnp.array([[[2.0], [3.0], [5.0]]])
    context = Context(jnp.ones((1, 5), jnp.int32), jnp.arange(5)[None])

    def of(cut):
        def total(p_BL):
            found = decide(Prediction(prob=p_BL), context, 3)
            layer = cut.dechunk.part(cut.dechunk, None, rngs=None)
            out_BLD = layer(y_BMD, found, open_slots(found, context, 3), cut.dechunk)
            return out_BLD.sum(), out_BLD[0, :, 0]

        (_, out_L), d_p_BL = jax.jit(jax.value_and_grad(total, has_aux=True))(p_BL)
        return out_L.tolist(), d_p_BL[0].tolist()

    names = ("hnet", "experiments.claims:no_smoothing", "experiments.claims:no_straight_through")
    whole, unsmoothed, unconfident = (of(base_config(n).model.stages[0].chunking) for n in names)
    z0 = 2 * (1 - 1e-4)
    z1 = 0.7 * 3 + 0.3 * z0
    z2 = 0.6 * 5 + 0.4 * z1
    by_average = [0, 0, (3 - z0) * 2.4, 0, 5 - z1]  # 2 z0 + 2 z1 + z2
    assert unsmoothed[0] == [2, 2, 3, 3, 5] and unsmoothed[1] == [0, -2, 3, -3, 5]
    assert whole[0] == unconfident[0] == pytest.approx([z0, z0, z1, z1, z2])
    assert unconfident[1] == pytest.approx(by_average)
    by_confidence = [0, -z0, z1, -z1, z2]
    assert whole[1] == pytest.approx([a + b for a, b in zip(by_average, by_confidence)])


# --- rates ----------------------------------------------------------------------------------------


def test_rates_compares_each_target_fixed_and_held(monkeypatch):
    given = []
    monkeypatch.setattr(compare, "main", lambda argv: given.append(argv) or 0)
    assert rates_main(["--workdir", "there", "--bytes", "4096"]) == 0
    (argv,), names = given, [word for word in given[0] if word.startswith("experiments.rates:")]
    assert argv.count("--workdir") == 1 and argv[argv.index("--workdir") + 1] == "there"
    assert argv[argv.index("--match") + 1] == "parameters" and len(names) == 7
    cuts = [base_config(name).model.stages[0].chunking for name in names[:6]]
    found = [(cut.target_ratio, cut.hold_rate) for cut in cuts]
    assert found == [(n, held) for n in (8.0, 9.0, 4.6) for held in (False, True)]
    assert rates.fixed_8().arch_layout == ["m2", ["T6"], "m2"]


# --- finished rows --------------------------------------------------------------------------------


def test_a_finished_row_is_not_taken_for_one_of_other_text_or_settings(tmp_path, capsys):
    text, run = tmp_path / "a.txt", tiny_run(tmp_path / "run")
    text.write_text("text " * 200)
    run = replace(run, data=replace(run.data, files=(str(text),)))
    assert finetune._finished(run) is None
    claim_workdir(run, run_inputs(run, open_corpus(run.data)))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 8, "eval/bpb": 2.5}\n')
    assert finetune._finished(run) == 2.5 and not capsys.readouterr().out
    assert finetune._finished(replace(run, optim=replace(run.optim, learning_rate=0.25))) == 2.5
    assert "optim.learning_rate=0.25 (it was 0.003): no effect" in capsys.readouterr().out
    text.write_text("other " * 200)
    with pytest.raises(ConfigError, match="^data.files: the content has fingerprint .*: give it"):
        finetune._finished(run)


def test_a_study_told_something_else_is_refused(tmp_path):
    study = scripts.FairnessTableConfig(("a=x", "b=y"), out=str(tmp_path / "study"))
    for _ in range(2):
        scripts.check_settings(tmp_path / "study", study)
    with pytest.raises(ConfigError, match="^bpe=300, but the study in out='.*' has 4096: use that"):
        scripts.check_settings(tmp_path / "study", replace(study, bpe=300))


# --- slots ----------------------------------------------------------------------------------------


@pytest.mark.every
def test_slots_that_are_too_few_clip_and_are_not_trained_twice(tmp_path, monkeypatch, capsys):
    run = tiny_run(tmp_path, model=ATTENTION)
    monkeypatch.setattr(slots, "build", build)
    monkeypatch.setattr(slots, "run_config", lambda argv, default: run)
    argv = ["slots", "--shares", "16", "--seeds", "1", "--workdir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", argv)
    assert slots.main() == 0
    printed = capsys.readouterr().out
    assert "follow the counts" in printed and "L/16" in printed
    follow, fixed = (json.loads((tmp_path / "rows" / f"share{n}-seed0.json").read_text())["row"]
                     for n in (0, 16))  # fmt: skip
    assert follow["clipped"] == 0 and follow["bpb"] == pytest.approx(follow["bpb_clipped"])
    assert fixed["clipped"] > 0.3 and abs(fixed["bpb"] - fixed["bpb_clipped"]) > 1e-3
    monkeypatch.setattr(slots, "build", None)
    assert slots.main() == 0 and capsys.readouterr().out == printed
    other = replace(run, seed=0, optim=replace(run.optim, learning_rate=1.0))
    with pytest.raises(ConfigError, match="share16-seed0.json' has other settings or text"):
        slots.row_of(other, open_corpus(run.data), 16, tmp_path / "rows")


def test_clipped_is_the_share_of_all_chunks_in_the_second_half_of_training(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("words " * 2000)
    run = tiny_run(tmp_path / "run", model=ATTENTION)
    files = (str(tmp_path / "a.txt"),)
    run = replace(run, data=replace(run.data, files=files), train=replace(run.train, steps=4))
    found = iter([(50, 1.0), (50, 1.0), (10, 0.5), (30, 0.1)])  # chunks, share that is clipped
    used = []

    class Program:
        mesh, hparams, ladder = None, None, SimpleNamespace(capacities=None)

        def init(self):
            return SimpleNamespace(params=None)

        def step(self, state, batch, hparams, *, capacities):
            used.append(capacities)
            self.ladder.observe = lambda counts: self.ladder
            names = ("stage0/chunks", "stage0/overflow_frac", "stage0/max_slots")
            return state, dict(zip(names, (*next(found), 7)))

    monkeypatch.setattr(slots, "build", lambda config: Program())
    monkeypatch.setattr(slots, "put_batch", lambda batch, mesh: batch)
    monkeypatch.setattr(slots, "eval_batches", lambda *of: [])
    monkeypatch.setattr(slots, "run_evaluation", lambda *of: SimpleNamespace(bpb=2.5))
    row = slots.train(run, open_corpus(run.data), 4)
    assert row["clipped"] == pytest.approx((10 * 0.5 + 30 * 0.1) / (10 + 30))
    assert row["bpb"] == 2.5 and used == [(math.ceil(run.data.seq_len / 4),)] * 4


def test_a_share_is_of_sums():
    assert (
        slots.share_of_sums([(1.0, 10.0), (3.0, 5.0)]) == 4 / 15
        and slots.share_of_sums([(0.0, 0.0)]) == 0
    )


def test_slots_names_a_network_of_two_stages(monkeypatch, tmp_path):
    assert slots.network().arch_layout == ["T3", ["T6"], "T3"]
    monkeypatch.setattr("sys.argv", ["slots", "bytes_transformer", "--workdir", str(tmp_path)])
    with pytest.raises(ConfigError, match="use a model with two stages"):
        slots.main()
