"""The mLSTM recurrence: a plain loop, and the numbers of NX-AI/mlstm_kernels 2.0.6 (Bolmo)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet.nn.mlstm import mlstm
from tests import oracles
from tests.golden_data import load, part, relative_error
from tests.networks import quick_jit

NAMES = ("q_BHLK", "k_BHLK", "v_BHLV", "igate_BHL", "fgate_BHL")
B, L, H = 2, 29, 3
rng = np.random.default_rng(0)
INPUTS = (
    *(np.float32(rng.normal(size=(B, L, H, n))) for n in (5, 5, 7)),
    np.float32(rng.normal(size=(B, L, H)) * [0.1, 3, 20]),  # weights up to e^50
    np.float32(rng.normal(size=(B, L, H)) * 3 + [0, 5, -5]),
)
SEGMENTS = np.stack([np.repeat([1, 2, 3], [9, 7, 13]), np.repeat([1, 0], [25, 4])]).astype(np.int32)


@pytest.mark.parametrize("block_len", [1, 8, 64])
def test_blocks_are_the_recurrence(block_len):
    run = quick_jit(lambda *a: mlstm(*a, block_len=block_len)[0])
    assert relative_error(run(*INPUTS, SEGMENTS), oracles.mlstm(*INPUTS, SEGMENTS)) < 5e-6


@pytest.mark.parametrize("case", ["plain", "start_minus_30", "start_minus_1e5"])
def test_values_and_gradients_are_those_of_bolmos_kernels(case):
    """Its documents begin with a forget gate of -30 or -1e5: ours with another segment, too.

    Sums of -1e5 cost its gradients 3e-3 to 1e-2 in float32.
    """
    stored = load("family/bolmo_mlstm")
    found = part(stored, "plain") | part(stored, case)
    by_position = lambda name: found[name].swapaxes(1, 2)
    inputs = [by_position(f"in/{name}") for name in NAMES]
    starts_BL = np.any(inputs[-1] < -20, axis=-1)
    assert starts_BL.any() == (case != "plain")
    value, gradient = (2e-2, 2e-2) if case.endswith("1e5") else (2e-5, 1e-4)

    def scalar(*inputs, segments):
        y = mlstm(*inputs, segments, block_len=8)[0]
        return jnp.sum(y * by_position("in/cot_BHLV")), y

    run = quick_jit(jax.value_and_grad(scalar, range(5), has_aux=True))
    for segments in (np.ones_like(starts_BL), 1 + np.cumsum(starts_BL, axis=1)):
        (_, y), grads = run(*inputs, segments=segments.astype(np.int32))
        assert relative_error(np.swapaxes(y, 1, 2), found["out/h_BHLV"]) < value
        for name, grad in zip(NAMES, grads):
            assert relative_error(np.swapaxes(grad, 1, 2), found[f"grad/{name}"]) < gradient
