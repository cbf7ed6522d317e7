"""The benchmark on a tiny network: fields, forced boundaries, and parts equal to the step's."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.benchmarks import step as benchmark_step
from experiments.benchmarks.__main__ import Benchmark
from experiments.benchmarks.step import Step, measure_steps, slots
from hnet.errors import ConfigError
from hnet.fields import check
from hnet.model import abstract
from tests.networks import quick_jit
from tests.training import ATTENTION, build, tiny_run


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_step, "build", build)
        return Step(tiny_run(tmp_path_factory.mktemp("run")), 0.25, "tiny")


@pytest.mark.every
def test_figures_of_a_step_and_its_parts(step):
    found = measure_steps([step], repeats=1, parts_of=step)
    (row,) = found["steps"]
    assert row["batch"] == [8, 32] and row["fraction"] == 0.25
    positive = {k: v for k, v in row.items() if k not in ("what", "batch")}
    assert all(v > 0 for v in positive.values()) and found["matmul_gflops"] > 0
    ratio = row["bytes_per_sec"] / found["matmul_gflops"]
    assert row["bytes_per_sec_over_gflops"] == pytest.approx(ratio)
    parts = {part["part"]: part for part in found["parts"]}
    assert {"stage0/encoder", "stage0/chunk", "stage1/main_network", "lm_head"} < parts.keys()
    share = sum(part["share_of_step"] for part in parts.values())
    assert found["parts_over_step"] == pytest.approx(share)
    assert all(p["ms"] > 0 and p["ms_at_matmul_rate"] >= 0 for p in parts.values())
    assert parts["stage1/main_network"]["ms_at_matmul_rate"] > 0


def test_cuts_are_forced_and_fill_the_slots_exactly(step):
    assert slots(step.config, 0.25) == (8,) == step.lengths[1:]
    ids = jnp.asarray(step.batch["input_ids"])

    @quick_jit
    def both(params):
        plain = nnx.merge(abstract(ATTENTION)[0], params)
        forced = nnx.merge(step.graph, params)
        return [model(ids, capacities=(n,))[1][0] for model, n in ((forced, 8), (plain, None))]

    route, learned = both(step.state.params)
    assert np.array_equal(route.boundary_mask_BL, np.tile([True] + [False] * 3, (8, 8)))
    assert np.array_equal(np.sum(route.boundary_mask_BL, axis=1), [8] * 8)
    assert not np.array_equal(learned.boundary_mask_BL, route.boundary_mask_BL)


def test_bad_settings_are_named():
    for changes, name in (({"fractions": (0.3,)}, "fractions"), ({"repeats": 0}, "repeats")):
        with pytest.raises(ConfigError, match=name):
            check(replace(Benchmark(), **changes))
