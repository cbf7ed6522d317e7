"""Checksums of arrays: equal to a slow loop, the same on any sharding, sensitive to any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hnet.checkpoint import leaves
from hnet.errors import ConfigError


def slow_checksum(x) -> str:
    """The two sums of `leaves._bit_sums`, one word after the other."""

    def mix(v):
        v = (v ^ (v >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
        v = (v ^ (v >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
        return v ^ (v >> 16)

    width = min(x.dtype.itemsize, 4)
    words = np.frombuffer(np.ascontiguousarray(x).tobytes(), f"<u{width}")
    a = sum(mix((int(w) + i * 0x9E3779B1) & 0xFFFFFFFF) for i, w in enumerate(words))
    b = sum(mix(mix(int(w) ^ 0x5BD1E995) ^ i) for i, w in enumerate(words))
    return f"{a & 0xFFFFFFFF:08x}{b & 0xFFFFFFFF:08x}"


def device_checksum(x) -> str:
    return "{:08x}{:08x}".format(*map(int, leaves._device_sums(x)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "float64"])
def test_checksum_is_the_slow_one(dtype):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).integers(-90, 90, (3, 5, 7)), jnp.dtype(dtype))
        assert leaves.checksums({"x": x})["x"] == slow_checksum(np.asarray(x))
        assert device_checksum(x) == slow_checksum(np.asarray(x))


def test_checksum_of_a_large_host_array_goes_by_pieces(monkeypatch):
    monkeypatch.setattr(leaves, "_PIECE", 11)
    x = np.random.default_rng(5).normal(size=(7, 5)).astype(np.float32)
    assert leaves.checksums({"x": x})["x"] == slow_checksum(x)


def test_checksum_does_not_depend_on_sharding():
    x = np.random.default_rng(2).normal(size=(8, 6)).astype(np.float32)
    auto = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    explicit = jax.make_mesh(
        (2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4]
    )
    shardings = [NamedSharding(auto, P("data", "fsdp")), NamedSharding(explicit, P("b", "a"))]
    placed = [jax.device_put(x, sharding) for sharding in shardings]
    for on_host, on_device in zip(leaves.checksums(dict(enumerate(placed))).values(), placed):
        assert on_host == device_checksum(on_device) == slow_checksum(x)


@settings(max_examples=40)
@given(st.integers(0, 10), st.integers(0, 31), st.integers(0, 10), st.integers(0, 10))
def test_checksum_sees_a_flipped_bit_and_a_swap(where, bit, i, j):
    x = np.random.default_rng(3).integers(0, 2**32, 11, dtype=np.uint32)
    flipped, swapped = x.copy(), x.copy()
    flipped[where] ^= np.uint32(1 << bit)
    swapped[[i, j]] = x[[j, i]]
    sums = leaves.checksums(
        {"x": jnp.asarray(x), "f": jnp.asarray(flipped), "s": jnp.asarray(swapped)}
    )
    assert sums["f"][:8] != sums["x"][:8] and sums["f"][8:] != sums["x"][8:]
    assert (sums["s"] == sums["x"]) == (i == j)


def test_parameters_without_a_run_say_how_to_start_from_them():
    saved, step = ({name: {"shape": [2], "dtype": "int8"}} for name in ("params/w", "step"))
    with pytest.raises(ConfigError, match="w1/checkpoints/0 holds parameters, .* --init.from w1/"):
        leaves.check_schema("w1/checkpoints/0", saved, saved | step)
    leaves.check_schema("w1/checkpoints/0", saved, saved)
