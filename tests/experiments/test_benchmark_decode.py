"""The decoding benchmark on a tiny network: its figures, its network, and bad settings."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.benchmarks.__main__ import Benchmark, measure
from experiments.benchmarks.decode import DecodeBenchmark, main_share, make_models
from hnet.config import EOS_ID
from hnet.errors import ConfigError
from hnet.fields import check

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = DecodeBenchmark((1,), outer_width=32, main_width=64, main_layers=1, bytes=8, repeats=2)


@pytest.mark.every
def test_figures_are_those_of_the_rates(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "True")  # for the process that decodes
    found = measure(Benchmark(measure=("decode",), decode=TINY))["decode"]
    (row,) = found["batches"]
    rate = row["bytes_per_sec"]
    assert row["batch"] == 1 and rate > 0 and row["bytes_per_chunk"] > 1.5
    assert row["over_main_at_every_byte"] == pytest.approx(rate / row["main_at_every_byte"])
    assert row["over_batch_1"] == pytest.approx(rate / row["in_step"])
    assert 0 < found["main_share_of_flops"] < 1
    wider = replace(TINY, main_width=512, main_layers=4)
    assert main_share(wider) > 0.98 > main_share(TINY)


def test_one_network_cuts_at_the_wanted_rate_and_its_twin_at_every_byte():
    ids = np.random.default_rng(1).integers(0, EOS_ID, (64, 64)).astype(np.int32)
    for model, low, high in zip(make_models(TINY), (0.17, 1.0), (0.29, 1.0)):
        graph, params = nnx.split(model)
        cuts = lambda p, graph=graph: nnx.merge(graph, p)(ids)[1][0].boundary_mask_BL
        assert low <= np.mean(jax.jit(cuts)(params)[:, 1:]) <= high


@pytest.mark.parametrize("name", ["repeats", "bytes", "main_layers", "bytes_per_chunk"])
def test_bad_settings_are_named(name):
    with pytest.raises(ConfigError, match=f"{name}=0"):
        check(replace(TINY, **{name: 0}))
