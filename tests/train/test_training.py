"""Whole runs at a tiny size: resume bit for bit, faults, accumulation, meshes, compilations."""

import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hnet.config import ChunkingConfig
from hnet.data import batch_fingerprint, train_batches
from hnet.data.fingerprint import fingerprint
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.inspect.tags import tag_of
from hnet.train import capacity, loop
from hnet.train.compiled_run import put_batch, run_batches
from hnet.train.config import MeshConfig, RateControlConfig, TrainConfig, config_from_json
from hnet.train.exact_offsets import SEED, set_exact_offsets
from hnet.train.optim import schedule
from hnet.train.session import StopRun
from hnet.train.sharding import replicated
from hnet.train.workdir import claim_workdir, read_config
from tests.training import TINY, build, rows, run, tiny_run


def bits(tree):
    """The leaves on the host, with random keys as their uint32 data."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.device_get(jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree))


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, bits(a), bits(b))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run of eight steps."""
    config = tiny_run(tmp_path_factory.mktemp("whole"))
    return config, run(config)


def test_a_run_learns_logs_and_leaves_what_the_plan_says(whole):
    config, outcome = whole
    table = rows(config)
    assert [row["step"] for row in table] == list(range(1, 9))
    assert table[-1]["loss/ce"] < table[0]["loss/ce"]
    needed = {"bytes_seen", "loss/ce", "train/bpb", "stage0/boundary_rate"}
    needed |= {"stage0/bytes_per_chunk", "stage0/overflow_frac", "stage0/slot_utilization"}
    assert all(needed <= row.keys() for row in table)
    assert "eval/bpb" in table[3] and "eval/bpb" in table[7] and "eval/bpb" not in table[2]
    assert table[-1]["eval/bpb"] == outcome.evaluation.bpb
    assert outcome.evaluation.num_bytes == outcome.corpus.heldout.num_bytes
    assert all(row["stage0/overflow_frac"] == 0 for row in table)
    assert read_config(config.workdir) == config


def test_tensorboard_says_what_metrics_jsonl_says(whole):
    """Each number once per step, those of the probe texts once per evaluation."""
    config, _ = whole
    events = EventAccumulator(f"{config.workdir}/tensorboard", {"scalars": 0}).Reload()
    table = {row["step"]: row for row in rows(config)}
    controls = [f"probe/stage0/f1_words{control}" for control in ("", "_random", "_stride")]
    for tag, steps in [
        ("loss/ce", range(1, 9)),
        *((tag, (4, 8)) for tag in ["eval/bpb", *controls]),
    ]:
        shown = events.Scalars(tag_of(tag).name)
        found = {e.step: e.value for e in shown if e.step}
        assert len(found) == len([e for e in shown if e.step])
        assert found == pytest.approx({step: table[step][tag] for step in steps})
    assert not any(key.startswith("probe/") for key in table[3])
    tags = sorted(events.Tags()["scalars"])
    assert tags[0] == "eval/bpb"  # shown as the first card
    groups = {"eval", "optim", "probe", "stage0", "throughput", "train"}
    assert {tag.partition("/")[0] for tag in tags} == groups
    kinds = ("scalars", "histograms", "images")
    shown = [*(tag for kind in kinds for tag in events.Tags()[kind]), "configuration"]
    assert all(events.SummaryMetadata(tag).summary_description for tag in shown)
    (text,) = events.Tensors("configuration")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert all(line.startswith("    ") for line in lines)
    assert config_from_json(json.loads("\n".join(lines))) == config


def test_the_same_command_after_the_end_changes_nothing(whole):
    config, outcome = whole
    before = rows(config)
    again = run(config)
    assert rows(config) == before
    assert_equal_trees(again.state, outcome.state)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A run that holds the rates of two stages; the inner stage's predictor draws noise."""
    outer, inner = TINY.stages
    ends = ChunkingConfig(2.0, "mlp", "end", pool="mean", losses=("binomial",), hold_rate=True)
    held = replace(outer.chunking, hold_rate=True, max_chunk_len=8)
    outer = replace(outer, chunking=held, arch_layout=("t1", ""))
    middle = replace(outer, chunking=ends, arch_layout=("t1", ""))
    model = replace(TINY, stages=(outer, middle, inner))
    rate_control = RateControlConfig(hold_frac=0.5)
    config = tiny_run(tmp_path_factory.mktemp("held"), model=model, rate_control=rate_control)
    return config, run(config)


@pytest.mark.parametrize("step", [0, 3, 4, 7])
def test_offsets_move_in_the_end_by_the_error_and_the_root_of_the_schedule(held, step):
    config, outcome = held
    program, before = outcome.program, bits(outcome.program.init().params)
    with train_batches(outcome.corpus, config.data, seed=0) as batches:
        fed = put_batch(next(batches), program.mesh)
    state = outcome.program.init()
    state = state._replace(step=jax.device_put(np.int32(step), state.step.sharding))
    capacities = program.ladder.capacities
    state, metrics = program.step(state, fed, program.hparams, capacities=capacities)
    factor = float(schedule(config.optim, jnp.int32(step), program.hparams[0].length))
    for s, (old, new) in enumerate(zip(offsets(before), offsets(bits(state.params)))):
        error = config.model.stages[s].chunking.target_ratio * metrics[f"stage{s}/boundary_rate"]
        expected = -config.rate_control.gain * np.sqrt(factor) * np.clip(error - 1, -1, 1)
        assert abs(expected) > 0.01 * factor
        acts = step >= 4  # half of 8 updates
        np.testing.assert_allclose(new - old, [expected * acts], rtol=1e-5)


def test_the_last_update_is_followed_by_exact_offsets(held, tmp_path):
    """Each stage is at its target on the text used to set the offsets; they are saved, once."""
    config, outcome = held
    with train_batches(outcome.corpus, config.data, seed=SEED) as batches:
        found = run_batches(
            outcome.program, outcome.state.params, islice(batches_of(batches), 8), (None, None)
        )
    sizes = np.divide([found.positions, found.chunks_by_stage[0]], found.chunks_by_stage)
    np.testing.assert_allclose(sizes, [3, 2], rtol=0.01)

    class StopAtTheEnd:
        def stop_requested(self, step):
            return step == 8

    stopped_config = replace(config, workdir=str(tmp_path))
    stopped = run(stopped_config, StopAtTheEnd())
    assert stopped.evaluation is None
    assert_equal_trees(stopped.state, outcome.state)
    again = run(stopped_config)
    assert_equal_trees(again.state, outcome.state)
    assert again.evaluation.bpb == outcome.evaluation.bpb

    without = [replace(config, rate_control=RateControlConfig(offset_bytes=0))]
    same = set_exact_offsets(
        outcome.program, outcome.state.params, outcome.corpus, without, (64, 64)
    )
    assert_equal_trees(same, outcome.state.params)


def offsets(params) -> list:
    outer = params["backbone"]
    return [outer["boundary_offset"], outer["main_network"]["boundary_offset"]]


def batches_of(batches):
    """The batches with document ids, which evaluation needs."""
    for batch in batches:
        yield batch | {"document_ids": np.zeros_like(batch["segment_ids"])}


@pytest.mark.parametrize("stop_at", [3, 4])
def test_a_stopped_run_resumes_to_the_same_bits_and_the_same_log(whole, tmp_path, stop_at):
    config = replace(whole[0], workdir=str(tmp_path))

    class StopAt:
        def stop_requested(self, step):
            return step >= stop_at

    stopped = run(config, StopAt())
    assert stopped.evaluation is None and int(stopped.state.step) == stop_at
    resumed = run(config)
    assert_equal_trees(resumed.state, whole[1].state)
    assert rows(config) == rows(whole[0])


@pytest.mark.every
def test_a_run_goes_on_with_fewer_devices_whose_rows_share_other_slots(tmp_path, monkeypatch):
    """2 rows share a row of slots on 4 devices, 8 rows on one device: no chunk is clipped."""
    monkeypatch.setattr(capacity, "SHRINK_AFTER", 2)
    config = tiny_run(tmp_path, train=TrainConfig(steps=6, log_every=1, rows_sharing_slots=8))

    class StopAtFour:
        def stop_requested(self, step):
            return step == 4

    run(config, StopAtFour(), devices=jax.devices()[:4])
    assert rows(config)[-1]["stage0/capacity"] < 2 * config.data.seq_len
    run(config, devices=jax.devices()[:1])
    assert all(row["stage0/overflow_frac"] == 0 for row in rows(config))


def test_a_damaged_last_checkpoint_costs_its_steps_only(whole, tmp_path):
    config = replace(whole[0], workdir=str(tmp_path))
    run(config)
    (tmp_path / "checkpoints" / "8" / "manifest.json").write_text("{")
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 9, "torn')
    resumed = run(config)
    assert_equal_trees(resumed.state, whole[1].state)
    assert rows(config) == rows(whole[0])


def test_another_run_in_the_same_folder_is_refused_and_nothing_is_lost(whole):
    config, _ = whole
    before = to_json(read_config(config.workdir))
    other = replace(config, data=replace(config.data, seq_len=64))
    with pytest.raises(ConfigError, match=r"data.seq_len=64.*has 32.*another workdir"):
        run(other)
    assert to_json(read_config(config.workdir)) == before


def test_a_longer_run_keeps_the_former_configuration(tmp_path):
    config = tiny_run(tmp_path)
    claim_workdir(config)
    longer = replace(config, train=replace(config.train, steps=99))
    claim_workdir(longer)
    assert read_config(tmp_path) == longer
    kept = config_from_json(json.loads((tmp_path / "config-1.json").read_text()))
    assert kept == config


def test_a_configuration_of_an_earlier_version_is_read_unless_it_would_train_otherwise(tmp_path):
    config = tiny_run(tmp_path)
    content = to_json(config)
    content["model"]["compute"]["batch_shards"] = 2
    content["data"]["unknown_script_frac"] = 0.0
    assert config_from_json(content) == config
    content["data"]["unknown_script_frac"] = 0.06
    with pytest.raises(ConfigError, match="unknown field data.unknown_script_frac"):
        config_from_json(content)
    content["controller"] = content.pop("rate_control")  # its name then
    del content["controller"]["hold_frac"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    held = replace(config, rate_control=replace(config.rate_control, hold_frac=1.0))
    assert read_config(tmp_path) == held  # the configuration of a trained model can still be read
    with pytest.raises(ConfigError, match="unknown_script_frac=0.06, which is not trained with"):
        claim_workdir(config)


def test_configuration_json_round_trip_and_its_errors(tmp_path):
    config = tiny_run(tmp_path)
    content = json.loads(json.dumps(to_json(config)))
    assert config_from_json(content) == config
    content["optim"]["learning_rat"] = 1.0
    with pytest.raises(ConfigError, match="unknown field optim.learning_rat.*learning_rate"):
        config_from_json(content)
    del content["optim"]["learning_rat"]
    content["train"]["steps"] = "many"
    with pytest.raises(ConfigError, match="train.steps='many': expected int"):
        config_from_json(content)


def batch_of(rows_count=8, length=32, seed=0):
    ids = np.random.default_rng(seed).integers(0, 256, (rows_count, length)).astype(np.int32)
    mask = np.ones_like(ids, bool)
    mask[:, 0] = False
    return {"input_ids": ids, "segment_ids": np.ones_like(ids), "loss_mask": mask}


def one_step(config, batch, capacities=(24,)):
    program = build(config)
    state = program.init()
    batch = put_batch(batch, program.mesh)
    return program, *program.step(state, batch, program.hparams, capacities=capacities)


@contextmanager
def compilations():
    """A list of the compilations of training steps within it."""
    compiled = []

    def count(event, seconds, **facts):
        if "backend_compile" in event and "train_step" in str(facts.get("fun_name")):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Result of one step on one device."""
    folder = tmp_path_factory.mktemp("single")
    config = tiny_run(folder, mesh=MeshConfig(data=1), train=WITH_NORMS)
    with compilations() as compiled:
        found = one_step(config, batch_of())
    assert len(compiled) == 1
    return found


WITH_NORMS = TrainConfig(steps=8, log_norms=True)
MESHES = [MeshConfig(8), MeshConfig(2, 4), MeshConfig(2, 2, 2)]


@pytest.mark.few("mesh", MESHES[2:], MESHES)
def test_losses_metrics_and_updates_depend_on_neither_mesh_nor_micro_batches(
    single, mesh, tmp_path
):
    """Two micro-batches on a mesh of three axes, one batch on other meshes."""
    trained = replace(WITH_NORMS, accumulate=1 + (mesh.tensor > 1))
    config = tiny_run(tmp_path, mesh=mesh, train=trained)
    program, state, metrics = one_step(config, batch_of())
    expected_state, expected = single[1], single[2]
    assert metrics.keys() == expected.keys()
    for name, value in jax.device_get(expected).items():
        if not name.endswith("max_slots"):  # a micro-batch has other rows of slots
            np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-5, err_msg=name)
    compare = partial(np.testing.assert_allclose, rtol=0, atol=2e-4)
    jax.tree.map(compare, jax.device_get(state.params), jax.device_get(expected_state.params))
    if mesh.fsdp > 1:
        kernel = state.params["backbone"]["main_network"]["main_network"]["layers"][0]["mlp"]["fc1"]
        shard = kernel["kernel"].addressable_shards[0].data.size
        assert shard * mesh.fsdp * mesh.tensor == kernel["kernel"].size
        moment = jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))[0]
        assert moment is not None


def test_numbers_of_a_sweep_are_traced_so_that_they_do_not_compile_again(single):
    program = single[0]
    state, batch = program.init(), put_batch(batch_of(), program.mesh)
    with compilations() as compiled:
        for factor in np.float32([1.0, 0.5, 2.0]):
            scale = lambda x, f=factor: (np.asarray(x) * f).astype(x.dtype)
            scaled = jax.tree.map(scale, program.hparams)
            scaled = jax.device_put(scaled, replicated(program.mesh))
            state, _ = program.step(state, batch, scaled, capacities=(24,))
    assert compiled == []


def test_a_non_finite_loss_skips_the_update(single):
    program = single[0]
    state, batch = program.init(), put_batch(batch_of(), program.mesh)
    kernel = state.params["lm_head"]["kernel"]
    state.params["lm_head"]["kernel"] = kernel.at[0, 0].set(jnp.nan)
    before = jax.device_get((state.params, state.opt_state))
    for count in (1, 2):
        state, metrics = program.step(state, batch, program.hparams, capacities=(24,))
        assert int(metrics["skipped_in_a_row"]) == count
        assert program.watched[int(metrics["first_non_finite"])] == "parameter lm_head.kernel"
    assert_equal_trees((state.params, state.opt_state), before)
    assert int(state.step) == 2


def test_faults_in_a_row_roll_back_once_and_end_the_run_with_a_name(tmp_path, monkeypatch):
    config = tiny_run(tmp_path, train=TrainConfig(steps=8, log_every=1, max_skipped=2))
    real, poisoned = loop.put_batch, []

    def poison(batch, mesh):
        fed = real(batch, mesh)
        poisoned.append(len(poisoned) in (5, 6))  # two batches after the checkpoint at step 4
        if poisoned[-1]:
            fed["input_ids"] = fed["input_ids"] * 0 + 10**6  # not a byte: the loss is NaN
        return fed

    monkeypatch.setattr(loop, "put_batch", poison)
    outcome = run(config)
    assert int(outcome.state.step) == 8
    assert len(poisoned) == 7 + 1 + 4  # 1 more step was in flight, then 4 from the checkpoint
    assert [row["step"] for row in rows(config)] == list(range(1, 9))
    monkeypatch.setattr(
        loop,
        "put_batch",
        lambda b, m: real(b, m) | {"input_ids": real(b, m)["input_ids"] * 0 + 10**6},
    )
    stop = replace(config, workdir=str(tmp_path / "other"))
    stop = replace(stop, train=replace(stop.train, on_non_finite="stop"))
    told = "non-finite loss or gradient in 2 updates in a row up to 2, first in stage0/aux_loss"
    with pytest.raises(StopRun, match=told):
        run(stop)
    assert [row["non_finite"] for row in rows(stop)] == ["stage0/aux_loss"]


def test_bfloat16_over_float32_weights_trains_as_float32_does(whole, tmp_path):
    model = replace(whole[0].model, compute=replace(whole[0].model.compute, dtype="bfloat16"))
    config = replace(whole[0], model=model, workdir=str(tmp_path))
    outcome = run(config)
    for row, expected in zip(rows(config), rows(whole[0])):
        difference = abs(row["loss/ce"] - expected["loss/ce"])
        assert 0 < difference < 0.01 * expected["loss/ce"]
    kept = jax.tree.leaves((outcome.state.params, outcome.state.opt_state))
    assert {leaf.dtype for leaf in kept if leaf.ndim} == {jnp.dtype("float32")}


def test_a_step_takes_over_the_memory_of_its_state(whole):
    config, outcome = whole
    state = outcome.program.init()
    batch = put_batch(batch_of(), outcome.program.mesh)
    outcome.program.step(state, batch, outcome.program.hparams, capacities=(32,))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not batch["input_ids"].is_deleted()


def test_a_step_says_what_it_was_fed(single):
    assert fingerprint(jax.device_get(single[2]["batch_hash"])) == batch_fingerprint(batch_of())


def test_an_evaluation_that_is_told_to_stop_ends_between_two_batches(whole, tmp_path):
    config = replace(whole[0], workdir=str(tmp_path))

    class AtTheSecondBatchOfTheFirstEvaluation:
        asked = 0

        def stop_requested(self, step):
            self.asked += 1
            return self.asked > 1

    stop = AtTheSecondBatchOfTheFirstEvaluation()
    outcome = run(config, stop)
    assert outcome.evaluation is None and int(outcome.state.step) == 0
    assert stop.asked == 3  # before each of two batches, and once by the loop
