"""Many runs in one program: same result as separate runs; one compilation; resumable."""

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.rounding import compare
from hnet.checkpoint.save import Checkpointer
from hnet.chunking.boundaries import Prediction
from hnet.chunking.losses.ratio import Ratio
from hnet.chunking.part import BoundaryPredictor, PredictorConfig
from hnet.config import ChunkingConfig
from hnet.data import open_corpus, train_batches
from hnet.errors import ConfigError
from hnet.runtime.compile_cache import CompilationLog
from hnet.runtime.stop_request import StopRequest
from hnet.train import parallel_program, parallel_runs
from hnet.train.compiled_run import put_batch, run_evaluation, untraced
from hnet.train.config import CheckpointConfig, EvalConfig, MeshConfig, TrainConfig
from hnet.train.exact_offsets import set_exact_offsets
from hnet.train.parallel_program import build as build_runs
from tests.networks import QUICK
from tests.training import ATTENTION, build, tiny_run

STEPS = 6


def variant(base, seed, rate, ratio, weight, gain, predictor="cosine"):
    held = predictor == "cosine"
    cut = ChunkingConfig(ratio, predictor, losses=(Ratio.Config(weight),), hold_rate=held)
    stages = (replace(ATTENTION.stages[0], chunking=cut), ATTENTION.stages[1])
    return replace(
        base,
        seed=seed,
        model=replace(ATTENTION, stages=stages),
        optim=replace(base.optim, learning_rate=rate, weight_decay=weight),
        rate_control=replace(base.rate_control, gain=gain),
    )


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    base = tiny_run(
        tmp_path_factory.mktemp("runs"),
        train=TrainConfig(steps=STEPS, log_every=1, log_norms=True, spike_deviations=6.0),
        eval=EvalConfig(every=2, max_bytes=200),
        checkpoint=CheckpointConfig(every=0),
        mesh=MeshConfig(data=1),
    )
    return [
        variant(base, 0, 1e-3, 3.0, 0.03, 0.5),
        variant(base, 1, 8e-3, 5.0, 0.3, 0.1),
        variant(base, 0, 8e-3, 3.0, 0.03, 0.5),
    ]


@lru_cache
def built(configs):
    return build_runs(configs, devices=jax.devices()[:2], compiler_options=QUICK)


def train(configs, workdir, stop=None, program=None, **hooks):
    with pytest.MonkeyPatch.context() as patch, StopRequest() as request:
        patch.setattr(parallel_runs, "build", lambda configs: program or built(tuple(configs)))
        return parallel_runs.train_parallel_runs(configs, str(workdir), stop or request, **hooks)


@pytest.fixture(scope="module")
def whole(configs, tmp_path_factory):
    """Outcome of the runs trained together, names of compiled programs, and rows shown."""
    shown, compiled = [], CompilationLog()
    outcome = train(configs, tmp_path_factory.mktemp("whole"), show=shown.append)
    return outcome, [entry.name for entry in compiled.entries], shown


def separate_run(config):
    """A plain loop over one run on one device."""
    program = build(config)
    corpus, state = open_corpus(config.data), program.init()
    with train_batches(corpus, config.data, seed=config.seed) as batches:
        for _ in range(STEPS):
            fed = put_batch(next(batches), program.mesh)
            state, _ = program.step(state, fed, program.hparams, capacities=(32,))
    held = float(np.abs(state.params["backbone"]["boundary_offset"]).max())
    params = set_exact_offsets(program, state.params, corpus, [config], (32,))
    state = state._replace(params=params)
    assert held > 0.01
    return state, run_evaluation(program, state.params, corpus.heldout, config, (32,))


def test_a_run_of_many_is_the_separate_run(configs, whole):
    r = 1
    state, evaluation = separate_run(configs[r])
    together = whole[0]
    # Adam divides a gradient by its own size: if the gradient is close to rounding error, the
    # relative error of the update (up to 3e-3 per update, 6 updates) is large.
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    jax.tree.map(
        lambda a, b: close(a[r], b), *jax.device_get((together.state.params, state.params))
    )
    np.testing.assert_allclose(together.evaluations[r].bpb, evaluation.bpb, rtol=1e-5)
    np.testing.assert_allclose(together.state.spikes.mean_K[r], state.spikes.mean_K, rtol=1e-5)
    assert together.evaluations[r].bytes_per_chunk(0) == evaluation.bytes_per_chunk(0)


class Constant(BoundaryPredictor):
    """The same logit everywhere."""

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """A logit."""

        traced = ("logit",)

        logit: float = 0.0
        """logit of p"""

    def step(self, state, x):
        return state, Prediction(jnp.full(x.index_R.shape, x.config.logit, jnp.float32))


def test_each_run_is_evaluated_with_its_own_numbers(configs):
    runs = [
        variant(configs[0], 0, 1e-3, 3.0, 0.03, 0.5, Constant.Config(logit)) for logit in (-1, 1)
    ]
    program = build_runs(runs, devices=jax.devices()[:1], compiler_options=QUICK)
    ones = np.ones((2, 16), np.int32)
    batch = {"input_ids": ones, "segment_ids": ones}
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), program.abstract_state.params)
    found = program.evaluate(zeros, batch, capacities=(None,))
    assert np.array_equal(found["num_chunks_S"][0], [2, 32])  # starts of rows; every position


@pytest.mark.every
def test_each_step_of_many_is_that_of_one_and_a_boundary_turns_only_at_a_half(configs):
    runs = [replace(config, mesh=MeshConfig()) for config in configs[:2]]
    for way in compare(runs, jax.devices()[:2], compiler_options=QUICK):
        assert len(way.gradient) == STEPS and 0 < max(way.gradient) < 1e-5
        assert max(way.nearest) < 1e-4 and all(n < 3 for n in way.turned)
        first = next((t for t, n in enumerate(way.turned) if n), STEPS)
        assert max(way.loss[: first + 1]) < 1e-5


def test_one_program_trains_them_all_and_nothing_moves_between_devices(configs, whole):
    _, compiled, shown = whole
    assert sum("parallel_step" in name for name in compiled) == 1
    assert not any("train_step" in name for name in compiled)
    assert [row["step"] for row in shown] == list(range(1, STEPS + 1))
    assert all(len(row["train/bpb"]) == 3 for row in shown)
    program = built(tuple(configs))
    assert program.mesh.shape["runs"] == 2
    batch = {
        name: jax.ShapeDtypeStruct((4, 8, 32), kind, sharding=program.shardings.step)
        for name, kind in (("input_ids", "int32"), ("segment_ids", "int32"), ("loss_mask", "bool"))
    }
    lowered = program.step.lower(program.abstract_state, batch, program.hparams, capacities=(32,))
    assert lowered.out_info[1]["update_norm/lm_head"].shape == (4,)
    text = lowered.compile(QUICK).as_text()
    for kind in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert f"{kind}(" not in text and f"{kind}-start(" not in text


def test_stopped_runs_go_on_to_the_same_bits_and_report_their_curve_again(configs, whole, tmp_path):
    class StopAt:
        def stop_requested(self, step):
            return step >= 3

    stopped = train(configs, tmp_path, StopAt())
    assert stopped.evaluations is None
    seen = []
    resumed = train(configs, tmp_path, watch=lambda *evaluated: seen.append(evaluated))
    equal = np.testing.assert_array_equal
    jax.tree.map(equal, *jax.device_get((resumed.state.params, whole[0].state.params)))
    assert [step for step, _ in seen] == [2, 4]
    assert resumed.progress.curve[1] == whole[0].progress.curve[1]
    assert [e.bpb for e in resumed.evaluations] == [e.bpb for e in whole[0].evaluations]


def test_a_watch_may_end_the_runs_and_a_fault_of_one_leaves_the_others(configs, tmp_path):
    program, many = built(tuple(configs)), replace(configs[0].train, max_skipped=2)
    numbers, weights = jax.device_get(program.hparams)
    rates = numbers.learning_rate * np.float32([1, 1e30, 1, 1])
    hparams = jax.device_put(
        (numbers._replace(learning_rate=rates), weights), program.shardings.step
    )
    patient = [replace(config, train=many) for config in configs]
    ends = {"program": replace(program, hparams=hparams), "watch": lambda step, bpb: step == 4}
    outcome = train(patient, tmp_path, **ends)
    assert outcome.evaluations[0].num_bytes >= 200 and int(outcome.state.step[0]) == 4
    assert outcome.progress.faults.keys() == {"1"}
    many = "non-finite loss or gradient in 2 updates in a row up to step 3"
    assert f"{many}, first in gradient decoder.rmsnorm.scale" in outcome.progress.faults["1"]


def test_a_state_that_was_padded_for_other_devices_is_restored(configs, tmp_path):
    """Three runs are four on two devices, and three on three."""
    two = built(tuple(configs))
    three = build_runs(configs, devices=jax.devices()[:3], compiler_options=QUICK)
    state = two.init()
    numbers = np.arange(4, dtype=np.float32)  # runs of one seed begin with equal parameters
    each = lambda x: x + numbers.reshape(4, *[1] * (x.ndim - 1))
    state = state._replace(
        params=jax.tree.map(lambda x: jax.device_put(each(x), x.sharding), state.params)
    )
    with Checkpointer(tmp_path, configs[0].checkpoint) as checkpoints:
        checkpoints.save(5, state, {})
        checkpoints.wait()
        for program, runs in ((three, [0, 1, 2]), (two, [0, 1, 2, 3])):
            restored = parallel_runs._restored(checkpoints, program, 3)
            assert restored.step == 5
            for found, kept in zip(*map(jax.tree.leaves, (restored.state.params, state.params))):
                assert found.sharding.is_equivalent_to(program.shardings.step, found.ndim)
                np.testing.assert_array_equal(found, np.asarray(kept)[runs])


def test_what_shares_a_program(configs):
    assert len({untraced(config) for config in configs}) == 1
    wider = replace(configs[0], optim=replace(configs[0].optim, b1=0.8))
    with pytest.raises(ConfigError, match="differ in more than traced numbers"):
        parallel_program.build([configs[0], wider])
    cut = replace(ATTENTION.stages[0].chunking, predictor="fixed")
    strides = [
        replace(
            ATTENTION,
            stages=(
                replace(ATTENTION.stages[0], chunking=replace(cut, target_ratio=n)),
                *ATTENTION.stages[1:],
            ),
        )
        for n in (2.0, 3.0)
    ]
    one, other = (untraced(replace(configs[0], model=model)) for model in strides)
    assert one != other
