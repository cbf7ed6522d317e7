"""Norms by part, the first tensor that is not finite, the spike rule, and utilization."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet.checkpoint import leaves
from hnet.checkpoint.save import Checkpointer
from hnet.config import ChunkingConfig, SSMConfig
from hnet.data import DataConfig
from hnet.errors import ConfigError
from hnet.flops import training_flops
from hnet.train import loop, run_state
from hnet.train.config import CheckpointConfig, EvalConfig, TrainConfig
from hnet.train.norms import first_non_finite, watched
from hnet.train.spikes import no_spikes, watch
from hnet.train.utilization import PEAKS, Utilization, peak_of
from tests.training import ATTENTION, rows, run, tiny_run
from tpu import chips

PARTS = {
    "embeddings", "stage0/encoder", "stage0/routing_module", "stage1/main_network",
    "stage1/pad_dimension", "stage0/residual_proj", "stage0/decoder", "lm_head",
}  # fmt: skip
SPIKES_AT = (12, 13)


def slow_spikes(values_TK, deviations, window):
    """(steps with a spike, means, variances) from a plain loop; the first `window` values give
    ordinary means and variances."""
    spikes, seen, mean_K, var_K = [], [], 0.0, 0.0
    for step, x_K in enumerate(values_TK):
        if not np.isfinite(x_K).all():
            continue
        if len(seen) >= window:
            std_K = np.maximum(var_K**0.5, 1e-3 * abs(mean_K))
            most_K = mean_K + deviations * std_K
            spikes += [step] if (x_K > most_K).any() else []
            x_K = np.minimum(x_K, most_K)
        seen.append(x_K)
        if len(seen) <= window:
            mean_K, var_K = np.mean(seen, axis=0), np.var(seen, axis=0)
        else:
            off_K, share = x_K - mean_K, 1 / window
            mean_K = mean_K + share * off_K
            var_K = (1 - share) * (var_K + share * off_K**2)
    return spikes, mean_K, var_K


def test_spikes_equal_a_plain_loop_and_a_lasting_change_is_accepted_in_the_end():
    window, step = 10, jax.jit(watch, static_argnums=3)
    values_TK = np.random.default_rng(0).normal([5, 0.5], [0.1, 0.05], (150, 2)).astype(np.float32)
    values_TK[4, 0] += 3  # before the rule acts
    values_TK[40, 1] *= 3
    values_TK[60, 0] = np.nan
    values_TK[61, 0] += 9
    values_TK[90:, 0] += 4
    state, found = no_spikes(), []
    for x_K in values_TK:
        is_spike, state = step(state, jnp.asarray(x_K), np.float32(5), window)
        found.append(bool(is_spike))
    expected, mean_K, var_K = slow_spikes(values_TK, 5, window)
    assert list(np.flatnonzero(found)) == expected
    assert {40, 61, 90, 91} <= set(expected) and 4 < len(expected) < 30 and max(expected) < 110
    assert (int(state.seen), int(state.skipped)) == (149, len(expected))
    np.testing.assert_allclose(state.mean_K, mean_K, rtol=1e-4)
    np.testing.assert_allclose(state.var_K, var_K, rtol=1e-3)


def test_the_first_tensor_that_is_not_finite():
    one = jnp.ones(2)
    stack = {"layers": {0: one, 1: one}, "rmsnorm": one}
    params = {"embeddings": one, "lm_head": one, "backbone": {
        "encoder": stack, "routing_module": one, "decoder": stack, "main_network": stack,
    }}  # fmt: skip
    losses = {"stage0/aux_loss": one[0], "loss/ce": one[0], "loss/total": one[0]}
    names = watched(params, 1)

    def found(bad):
        def spoilt(kind, tree):
            named, treedef = leaves.flatten(tree)
            word = f"{kind} " if kind else ""
            return jax.tree.unflatten(treedef, [
                leaf * np.nan if f"{word}{path}".replace("/", ".") in bad else leaf
                for path, leaf in named.items()
            ])  # fmt: skip

        grads = spoilt("gradient", params)
        grads["embeddings"] = None  # frozen
        index = first_non_finite(spoilt("parameter", params), spoilt("", losses), grads, 1)
        return names[int(index)] if index >= 0 else ""

    prefix = "gradient backbone."
    backward = ["decoder.rmsnorm", "decoder.layers.1", "decoder.layers.0", "main_network.layers.0",
                "routing_module", "encoder.layers.1"]  # fmt: skip
    bad = ["parameter embeddings", "loss.ce", "loss.total", "gradient lm_head"]
    bad += [prefix + name for name in backward]
    while bad:
        assert found(bad).replace("/", ".") == bad[0].replace("backbone.", "")
        bad = bad[1:]
    assert found(bad) == ""


@pytest.fixture(scope="module")
def patch():
    """Updates SPIKES_AT, counted from 1, read bytes that the model has not seen."""
    with pytest.MonkeyPatch.context() as patch:
        real = loop.put_batch
        fed = SimpleNamespace(step=0)

        def spoil(batch, mesh):
            fed.step += 1
            batch = real(batch, mesh)
            if fed.step in SPIKES_AT:
                batch["input_ids"] = batch["input_ids"] * 0 + 200
            return batch

        patch.setattr(loop, "put_batch", spoil)
        yield fed


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_run(
        tmp_path_factory.mktemp("watched"),
        model=ATTENTION,
        train=TrainConfig(
            steps=15,
            log_every=5,
            log_norms=True,
            log_groups=True,
            spike_deviations=4,
            spike_window=10,
        ),
        data=DataConfig(("synthetic:latin", "synthetic:cyrillic"), eval_max_bytes=600, seq_len=32),
        eval=EvalConfig(every=0, probe_bytes=20),
        checkpoint=CheckpointConfig(every=0),
    )


@pytest.fixture(scope="module")
def whole(patch, config):
    return run(config)


def test_norms_of_the_parts_add_up_and_a_spike_is_skipped_counted_and_told(whole, config):
    table = {row["step"]: row for row in rows(config)}
    assert table.keys() == {1, 5, 10, *SPIKES_AT, 15}
    for row in table.values():
        for name in ("grad_norm", "update_norm"):
            parts = {k.removeprefix(f"{name}/"): v for k, v in row.items() if f"{name}/" in k}
            assert parts.keys() == PARTS and (row["step"] in SPIKES_AT or min(parts.values()) > 0)
            assert sum(v**2 for v in parts.values()) == pytest.approx(row[name] ** 2, rel=1e-4)
        is_spike = row["step"] in SPIKES_AT
        assert row["spike"] == is_spike and (row["update_norm"] == 0) == is_spike
    assert [row["spikes"] for row in table.values()] == [0, 0, 0, 1, 2, 2]
    assert int(whole.state.spikes.seen) == 15
    for kind, names in (("source", ("synthetic:latin", "synthetic:cyrillic")),
                        ("script", ("Latin", "Cyrillic"))):  # fmt: skip
        own = [table[15][f"train/{kind}_{name}/bpb"] for name in names]
        assert min(own) < table[15]["train/bpb"] < max(own)


def test_the_rule_is_resumed_bit_for_bit(whole, config, patch, tmp_path, capsys):
    again = replace(config, workdir=str(tmp_path))
    patch.step = 0
    run(again, stop=SimpleNamespace(stop_requested=lambda step: step == 12))
    assert "step 12: update skipped, a spike: loss " in capsys.readouterr().out
    resumed = run(again)
    for name in ("params", "opt_state", "spikes"):
        mine, theirs = getattr(resumed.state, name), getattr(whole.state, name)
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    assert rows(again) == rows(config)


def test_the_rule_may_be_turned_on_and_off_between_two_starts(whole, tmp_path):
    program, state = whole.program, whole.state
    without = state._replace(spikes=())
    for saved, wanted in ((state, without), (without, state)):
        extras = {"position": {"data": 7}}
        with Checkpointer(tmp_path / str(len(saved.spikes))) as checkpoints:
            checkpoints.save(15, saved, extras)
            checkpoints.wait()
            changed = replace(program, abstract_state=wanted)
            found, position = run_state.restored(checkpoints, changed)
        assert position.data == 7 and len(found.spikes) == len(wanted.spikes)
        jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
    assert int(found.spikes.seen) == 0


@pytest.mark.parametrize("fields", [{"spike_deviations": 1.5}, {"spike_window": 9}])
def test_rules_that_would_skip_most_updates_are_refused(fields):
    ((name, _),) = fields.items()
    with pytest.raises(ConfigError, match=f"train.{name}="):
        TrainConfig(**fields)


def devices(kind, *places):
    """A mesh of devices of this kind; places: coordinates of their chips, or numbers."""
    named = [
        SimpleNamespace(device_kind=kind, id=i, **({} if isinstance(at, int) else {"coords": at}))
        for i, at in enumerate(places)
    ]
    return SimpleNamespace(devices=np.array(named))


def test_peaks_are_those_of_chips_and_agree_with_the_planner():
    assert peak_of(devices("TPU v4", (0, 0, 0), (0, 0, 0), (1, 0, 0)), "bfloat16") == 2 * 275e12
    assert peak_of(devices("NVIDIA H200", 0, 1), "float32") == 2 * 494.7e12
    assert peak_of(devices("cpu", 0), "float32") is None
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    kinds |= {"tpu7x": "TPU7x"} | {kind: gpu.name for kind, gpu in chips.GPUS.items()}
    assert {k: PEAKS[name].bfloat16 for k, name in kinds.items()} == {
        k: chip.flops for k, chip in chips.CHIPS.items()
    }


def test_utilization_counts_the_chunks_that_are_used(tmp_path):
    outer, main = ATTENTION.stages
    outer = replace(outer, chunking=ChunkingConfig(2.0))
    model = replace(ATTENTION, stages=(outer, replace(main, arch_layout=("m2",))))
    config = tiny_run(tmp_path, model=replace(model, ssm=SSMConfig(d_state=5, head_dim=8)))
    found = Utilization(config, 1.0)
    for slots, off in ((16, 1e-9), (32, 0.1)):
        parts = training_flops(config.model, (32, slots))
        expected = 8 * sum(cost.matmul for cost in parts.values())
        assert found.flops([8 * slots]) == pytest.approx(expected, rel=off)
