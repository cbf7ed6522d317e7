"""Kernels in interpret mode against plain loops and array code; the table; compiling for a TPU."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from hnet.config import ComputeConfig, StageConfig
from hnet.errors import ConfigError
from hnet.nn.attention import attention_reference
from hnet.nn.kernels.conv_triton import conv_silu_triton
from hnet.nn.kernels.convolution import causal_conv_silu
from hnet.nn.kernels.cudnn import attention_cudnn
from hnet.nn.kernels.derivatives import gated, rms_norm
from hnet.nn.kernels.gate_triton import gate_norm_triton
from hnet.nn.kernels.sharded import sharded_over_rows
from hnet.nn.kernels.splash import attention_splash
from hnet.nn.kernels.ssd import ssd_pallas
from hnet.nn.kernels.ssd_matmul import ssd_matmul
from hnet.nn.kernels.ssd_triton import ssd_triton
from hnet.nn.kernels.table import (
    KERNELS,
    Kernel,
    array_block_len,
    described,
    kernel,
    resolved,
    without,
)
from hnet.nn.ssd import ssd_reference
from hnet.train.config import MeshConfig
from hnet.train.named import base_config
from hnet.train.sharding import batch_sharding, make_mesh, replicated
from tests import oracles
from tests.golden_data import relative_error
from tests.networks import quick_jit
from tpu import hlo
from tpu.aot import compile_plan
from tpu.chips import assumed_cudnn, open_slice

rng = np.random.default_rng(0)


def value_and_gradients(f, cotangent, *arrays):
    scalar = lambda *a: (jnp.sum(f(*a) * cotangent), f(*a))
    run = jax.grad(scalar, tuple(range(len(arrays))), has_aux=True)
    gradients, out = quick_jit(run)(*arrays)
    return [out, *gradients]


def assert_same(ours, expected, tolerance):
    for a, b in zip(ours, expected, strict=True):
        assert np.all(np.isfinite(a))
        assert relative_error(a, b) < tolerance


# --- attention ----------------------------------------------------------------------------------

H, K = 2, 5
SPLASH = partial(attention_splash, block_len=128, interpret=True)
CUDNN = partial(attention_cudnn, block_len=11, library="xla")
CUDNN_WHOLE = partial(attention_cudnn, library="xla")


def rows_of(*lengths_of_segments):
    return np.stack([np.repeat(np.arange(len(n), dtype=np.int32), n) for n in lengths_of_segments])


@pytest.mark.parametrize(
    "f, rows, window",
    [
        (SPLASH, 2, -1), (SPLASH, 2, 7), (SPLASH, 1, -1), (SPLASH, 1, 139),
        (CUDNN, 2, -1), (CUDNN, 2, 7), (CUDNN, 2, 0), (CUDNN_WHOLE, 2, -1), (CUDNN_WHOLE, 2, 11),
    ],
)  # fmt: skip
def test_attention_kernels_are_the_reference(f, rows, window):
    """Several blocks, rows of prime length with documents, and padding, also in front."""
    L = 293 if rows == 1 else 37
    cuts = [(L - 140, 1, 128, 11)] if rows == 1 else [(0, L - 23, 11, 12), (5, 2, 1, L - 8)]
    segments = rows_of(*cuts)
    if rows == 1:  # the last document is padding
        segments = np.where(segments == 3, 0, segments + 1).astype(np.int32)
    q, k, v, cotangent = (np.float32(rng.normal(size=(rows, L, H, K))) for _ in range(4))
    ours = lambda *a: f(*a, segments, window=window)
    whole = lambda *a: attention_reference(*a, segments, window=window)
    expected = value_and_gradients(whole, cotangent, q, k, v)
    assert relative_error(expected[0], oracles.attention(q, k, v, segments, window)) < 2e-6
    assert_same(value_and_gradients(ours, cotangent, q, k, v), expected, 2e-6)


def test_a_single_row_skips_blocks_without_a_common_segment():
    """A key of another document, in a block that must not run, is NaN and has no effect."""
    segments = rows_of((0, 128, 128, 41))
    q, k, v = (np.float32(rng.normal(size=(1, 297, H, K))) for _ in range(3))
    clean = SPLASH(q, k, v, segments)
    k[:, :128] = v[:, :128] = np.nan
    out = SPLASH(q, k, v, segments)
    assert np.all(np.isnan(out[:, :128]))
    assert np.array_equal(out[:, 128:], clean[:, 128:])


# --- SSD ----------------------------------------------------------------------------------------


SSDS = {
    "pallas": partial(ssd_pallas, interpret=True), "matmul": ssd_matmul,
    "triton": partial(ssd_triton, interpret=True),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, heads, channels, block_len",
    # one group of heads, two groups; a block longer than the row
    [
        ("pallas", 3, 5, 8), ("pallas", 16, 16, 8), ("matmul", 3, 5, 8), ("matmul", 2, 5, 31),
        ("triton", 3, 5, 16),
    ],
)  # fmt: skip
def test_ssd_kernels_are_the_recurrence(name, heads, channels, block_len):
    """29 positions in blocks of 8 (53 of 16); documents end in and between blocks; ids recur."""
    B, L, N = 2, (53 if block_len == 16 else 29), 7
    ends = [block_len, 3, 12, L - block_len - 15] if block_len < L else [8, 3, 12, L - 23]
    segments = np.stack([np.repeat([3, 1, 3, 0], ends), np.ones(L)]).astype(np.int32)
    x, cotangent = (np.float32(rng.normal(size=(B, L, heads, channels))) for _ in range(2))
    dt = np.float32(rng.uniform(0.01, 1, size=(B, L, heads)))
    A = -np.float32(rng.uniform(0.05, 4, size=heads))
    A[-1] = -40  # forgets within a position: differences of long sums would cancel
    B_BLN, C_BLN = (np.float32(rng.normal(size=(B, L, N))) for _ in range(2))

    def ours(x, dt, A, b, c, *skip):
        log_a = dt * A[None, None]
        return SSDS[name](x, dt, log_a, b, c, segments, *skip, block_len=block_len)

    inputs, plain = (x, dt, A, B_BLN, C_BLN), lambda *a: ssd_reference(*a, segments)
    if name == "triton":  # adds the skip connection too
        inputs += (np.float32(rng.normal(size=heads)),)
        plain = lambda x, *a: ssd_reference(x, *a[:-1], segments) + a[-1][None, None, :, None] * x
    loop = value_and_gradients(plain, cotangent, *inputs)
    # "triton" is for bfloat16: its decays are differences of two sums over a block
    tolerance = 4e-5 if name == "triton" else 4e-6
    assert_same(value_and_gradients(ours, cotangent, *inputs), loop, tolerance)


@pytest.mark.parametrize("length, channels", [(24, 6), (13, 7), (2, 4)])
def test_the_derivative_of_the_convolution(length, channels):
    """3 blocks of 8 positions and 3 of 2 channels; documents shorter than the taps; odd lengths."""
    x, cotangent = (np.float32(rng.normal(size=(2, length, channels))) for _ in range(2))
    documents = np.sort(rng.integers(0, 9, length)), np.ones(length)
    segments = np.stack(documents).astype(np.int32)
    inputs = [x, *(np.float32(rng.normal(size=s)) for s in ((4, channels), channels))]
    ours, plain = (
        value_and_gradients(lambda *a, f=f: f(*a, segments), cotangent, *inputs)
        for f in (partial(conv_silu_triton, interpret=True), causal_conv_silu)
    )
    assert_same(ours, plain, 4e-6)


def test_gate_norm_is_the_norm_of_a_gated_product():
    """34 rows in blocks of 2; 13 channels in slices of 8, 4 and 1."""
    y, z, cotangent = (np.float32(rng.normal(size=(2, 17, 13))) for _ in range(3))
    y[0] *= 3e-3  # so that the epsilon matters
    inputs = (y, z, np.float32(rng.normal(size=13)))
    ours = value_and_gradients(partial(gate_norm_triton, interpret=True), cotangent, *inputs)
    plain = lambda y, z, scale: rms_norm(gated(y, z), scale)
    assert_same(ours, value_and_gradients(plain, cotangent, *inputs), 2e-6)
    narrow = gate_norm_triton(
        *(a.astype(jnp.bfloat16) for a in inputs[:2]), inputs[2], interpret=True
    )
    assert narrow.dtype == jnp.bfloat16 and relative_error(np.float32(narrow), ours[0]) < 2e-2


@pytest.mark.parametrize(
    "name, dtype",
    [("pallas", jnp.float32), ("matmul", jnp.bfloat16), ("triton", jnp.bfloat16)],
)
def test_ssd_kernels_in_bfloat16_stay_near_the_recurrence(name, dtype):
    segments = np.ones((1, 16), np.int32)
    x, b, c = (rng.normal(size=(1, 16, *s)).astype(jnp.bfloat16) for s in ((2, 4), (3,), (3,)))
    dt = np.full((1, 16, 2), 0.1, np.float32)
    y = SSDS[name](x, dt, -dt, b, c, segments, block_len=8)
    wide = (np.float32(a) for a in (b, c))
    exact = ssd_reference(np.float32(x), dt, np.full(2, -1, np.float32), *wide, segments)
    assert y.dtype == dtype
    assert relative_error(y, exact) < 2e-2


# --- meshes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, heads, shape", [(4, 2, (1, 13, 1)), (3, 2, (3, 13, 1))])
def test_each_device_gets_its_rows_and_heads(rows, heads, shape):
    """Dimensions that the mesh axes do not divide are replicated; a mesh is not needed."""
    devices = np.array(jax.devices()[:8]).reshape(2, 2, 2)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    seen = []

    def product(a_BLH, b_BL, c_L):
        seen.append(a_BLH.shape)
        return a_BLH * b_BL[..., None] * c_L[None, :, None]

    def run(*arrays):
        return sharded_over_rows(product, ("BLH", "BL", "L"), "BLH", *arrays)

    def run_on_mesh(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run(*arrays)

    shapes = (rows, 13, heads), (rows, 13), 13  # the last is replicated, its gradient a sum
    a, *others = (np.float32(rng.normal(size=s)) for s in shapes)
    place = jax.sharding.NamedSharding(mesh, P())
    placed = (jax.device_put(x, place) for x in (a, *others))
    on_mesh = value_and_gradients(run_on_mesh, a, *placed)
    assert set(seen) == {shape}
    assert_same(on_mesh, value_and_gradients(run, a, a, *others), 1e-6)
    assert seen[-1] == a.shape


# --- the table ----------------------------------------------------------------------------------


def test_auto_takes_kernels_where_they_were_seen_to_compile():
    narrow = ComputeConfig("bfloat16")
    found = {p: resolved(narrow, p) for p in ("cpu", "gpu", "tpu")}
    assert found["cpu"] == without(resolved(narrow, "cpu"))
    assert [(c.dtype, c.inputs) for c in found.values()] == [
        ("float32", "bfloat16"), ("bfloat16", None), ("bfloat16", None)
    ]  # fmt: skip
    assert described(found["cpu"], "cpu").endswith(", matmul inputs bfloat16")
    assert (found["tpu"].attention_backend, found["tpu"].ssd_backend) == ("splash", "pallas")
    assert (found["gpu"].attention_backend, found["gpu"].ssd_backend) == ("cudnn", "matmul")
    assert kernel("attention_backend", found["tpu"]) is attention_splash
    assert kernel("ssd_backend", found["cpu"]) is kernel("ssd_backend", ComputeConfig()) is None
    first, second = described(found["tpu"], "tpu").split("\n")
    assert first == "kernels on tpu: attention splash, ssd pallas"
    assert "not timed on this hardware" in second and "--model.compute.tuned FILE" in second


def test_blocks_suit_the_platform_unless_the_configuration_says_otherwise():
    line = described(resolved(ComputeConfig(), "gpu"), "gpu").split("\n")[0]  # float32: no cuDNN
    assert line == "kernels on gpu: attention xla in blocks of 1024, ssd matmul in blocks of 128"
    line = described(resolved(ComputeConfig(), "cpu"), "cpu")
    assert line == "kernels on cpu: attention xla in blocks of 128, ssd xla in blocks of 64"
    assert resolved(ComputeConfig("bfloat16"), "cpu").attention_block_len == 256
    named = resolved(ComputeConfig("bfloat16", ssd_block_len=32, attention_block_len=512), "gpu")
    assert (named.ssd_block_len, named.attention_block_len) == (32, 512)
    ssd = kernel("ssd_backend", named)
    assert (ssd.func, ssd.keywords) == (ssd_matmul, {"block_len": 32})
    assert array_block_len("ssd_backend", ComputeConfig()) == 64
    assert array_block_len("attention_backend", named) == 512


def test_more_channels_than_cudnn_takes_get_one_line():
    q = jnp.zeros((1, 8, 1, 129))
    with pytest.raises(ValueError, match="129 channels per head.*attention_backend xla") as e:
        attention_cudnn(q, q, q, jnp.zeros((1, 8), jnp.int32))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "fields, platform, message",
    [
        ({"attention_backend": "splash"}, "cpu", "attention_backend='splash' runs on a tpu"),
        ({"ssd_backend": "pallas"}, "gpu", "ssd_backend='pallas' runs on a tpu"),
        ({"attention_backend": "cudnn"}, "gpu", "--model.compute.dtype bfloat16"),
    ],
)
def test_kernels_that_the_devices_lack_get_one_line(fields, platform, message):
    with pytest.raises(ConfigError, match=message) as e:
        resolved(ComputeConfig(**fields), platform)
    assert "\n" not in str(e.value) and str(e.value).startswith("model.compute.")


def test_every_kernel_is_a_value_of_its_field():
    for field, kernels in KERNELS.items():
        allowed = ComputeConfig.__annotations__[field].__args__
        assert {*kernels, "auto", "xla"} == set(allowed)


# --- compiled for the hardware, which is not there -----------------------------------------------

SLICES = {"tpu": "v5e:2x2", "gpu": "h100:4"}
# how a kernel appears in the program; `matmul` is array code
CALLS = {
    "splash": "tpu_custom_call", "pallas": "tpu_custom_call", "cudnn": "cudnn$fmha",
    "triton": "xla.gpu.triton", "matmul": "dot",
}  # fmt: skip
COMPILERS = {"tpu": pytest.mark.libtpu, "gpu": pytest.mark.cuda}
ROWS = [
    pytest.param(field, name, marks=COMPILERS[row.platform])
    for field, kernels in KERNELS.items()
    for name, row in kernels.items()
]
AXES = {
    "attention_backend": ("BLHK", "BLHK", "BLHK", "BL"),
    "ssd_backend": ("BLHP", "BLH", "BLH", "BLN", "BLN", "BL"),
}
SIZES = {"B": 4, "L": 1000, "H": 2, "K": 64, "P": 64, "N": 16, "C": 64, "D": 128, "W": 4}


def kernels_of(field: str, row: Kernel) -> list[tuple]:
    """(function, axes of its inputs, least number of kernels forward and backward) of a row; the
    result has the axes of the first input."""
    run = partial(row.run, block_len=row.block_len) if row.block_len else row.run
    if not row.around:
        return [(run, AXES[field], 0 if row.run is ssd_matmul else 2)]
    around = [
        (row.around.conv_silu, ("BLC", "WC", "C", "BL"), 1),
        (row.around.gate_norm, ("BLD", "BLD", "D"), 1),
    ]
    return [(run, (*AXES[field], "H"), 2), *around]


@pytest.mark.parametrize("field, name", ROWS)
def test_a_row_of_the_table_compiles_for_its_hardware(field, name):
    """Values and gradients, to machine code; each of four devices has one row of several blocks."""
    row = KERNELS[field][name]
    slice_ = open_slice(SLICES[row.platform])
    mesh = make_mesh(MeshConfig(2, 2), slice_.devices)
    dtypes = {"BL": jnp.int32, "BLH": jnp.float32, "H": jnp.float32, "D": jnp.float32}

    def shape(letters):
        by_rows = batch_sharding(mesh) if "B" in letters else replicated(mesh)
        dtype = dtypes.get(letters, jnp.bfloat16)
        return jax.ShapeDtypeStruct([SIZES[a] for a in letters], dtype, sharding=by_rows)

    for function, axes, calls in kernels_of(field, row):
        kept = [i for i, letters in enumerate(axes) if letters != "BL"]

        @jax.jit
        def both(*inputs, function=function, axes=axes, kept=kept):
            def run(*floats):
                given = list(inputs)
                for i, x in zip(kept, floats):
                    given[i] = x
                return sharded_over_rows(function, axes, axes[0], *given)

            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                y, gradients = jax.vjp(run, *(inputs[i] for i in kept))
                return y, gradients(y)

        with assumed_cudnn(slice_):
            lowered = both.lower(*map(shape, axes))
        assert lowered.as_text().count(CALLS[name]) >= calls
        lowered.compile()


@pytest.mark.libtpu
def test_kernels_move_nothing_between_the_tpus_of_a_training_step():
    """On data x fsdp = 2 x 2: no collective moves more than with the array code."""
    config = base_config("default")
    stage = StageConfig(("m1t1",), 64, num_heads=1, rotary_emb_dim=16, window_size=31)
    data = replace(config.data, batch_size=4, seq_len=256)
    slice_ = open_slice("v5e:2x2")
    sums = []
    for compute in (ComputeConfig("bfloat16"), without(ComputeConfig("bfloat16"))):
        model = replace(config.model, stages=(stage,), compute=compute)
        made = replace(config, model=model, data=data, mesh=MeshConfig(2, 2))
        plan = compile_plan(made, slice_, (), to_code=False)
        assert plan.fits
        sums.append(
            {k: sum(m.num_bytes for m in plan.moved if m.kind == k) for k in hlo.COLLECTIVES}
        )
    kernels, arrays = sums
    assert 0 < sum(kernels.values()) <= sum(arrays.values())
    assert all(kernels[k] <= arrays[k] for k in hlo.COLLECTIVES)
