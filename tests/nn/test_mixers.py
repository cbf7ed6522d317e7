"""Every mixer of the table, and every option of attention: the equation, the stream, the scope.

A stack is an `Isotropic` by itself; rows are packed, ragged and of prime length.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from hnet.config import ChunkingConfig, HNetConfig, StageConfig
from hnet.cost import count
from hnet.errors import ConfigError
from hnet.flops import param_counts
from hnet.nn import cache as nn_cache
from hnet.nn.cache import Rows
from hnet.nn.context import Context, Memory, StepContext
from hnet.nn.isotropic import Isotropic
from hnet.nn.kernels import table
from hnet.nn.mixers import MIXERS
from hnet.nn.mixers.base import Mixer
from hnet.nn.parameters import describe
from hnet.nn.settings import (
    AttentionConfig,
    CrossAttentionConfig,
    GatedDeltaNetConfig,
    MLSTMConfig,
)
from hnet.train.sharding import MeshConfig, make_mesh, state_shardings
from tests import oracles
from tests.golden_data import relative_error
from tests.networks import COMPUTE, drawn, network, optimized_jit, quick_jit, stage

B, L, D = 3, 29, 52
rng = np.random.default_rng(0)
X = np.float32(rng.normal(size=(B, L, D)))
SEGMENTS = np.stack(
    [np.ones(L), np.repeat([1, 2, 3], [9, 7, 13]), np.repeat([1, 2, 0], [11, 14, 4])]
).astype(np.int32)
ONE = np.ones((B, L), np.int32)
CHUNKS = np.stack(  # scopes that start again, different per row
    [np.repeat(np.arange(1, 6), [6, 1, 11, 4, 7]), np.repeat([1, 2], [3, 26]), np.ones(L)]
).astype(np.int32)
BIAS = np.float32(rng.normal(size=(B, L)))
POSITIONS = np.cumsum(rng.integers(1, 4, (B, L)), axis=1, dtype=np.int32)
WIDTH = 16  # channels of the memory
MEMORY = Memory(
    np.float32(rng.normal(size=(B, 5, 2, WIDTH))),  # two vectors per group
    np.sort(rng.integers(0, 5, (B, L)), axis=1).astype(np.int32),
)
NUMBERED = MEMORY._replace(group_GM=np.int32([[3, 0, 1, 4, -1]] * B))  # a ring of groups


def grouped(**options):
    return {"cross_attention": CrossAttentionConfig(memory_width=WIDTH, **options)}


def attention(**options):
    return {"attention": AttentionConfig(**options)}


# name -> layout, fields of the stage, inputs in addition to the states
STACKS = {
    "mamba2": ("m1M1", {}, {}),
    "attention": ("t1T1", {"window_size": 7}, {}),
    "kv_heads": ("t1", {"num_heads": 13, "rotary_emb_dim": 2, **attention(num_kv_heads=1)}, {}),
    "qk_norm": ("t1", attention(qk_norm=True), {}),
    "soft_cap": ("t1", attention(logit_soft_cap=1.5), {}),
    "sink_one": ("t1", {"window_size": 3, **attention(sink="one")}, {}),
    "sink_learned": ("t2", attention(sink="learned"), {}),
    "key_bias": ("t2", {"window_size": 7}, {"key_bias": BIAS}),
    "positions": ("t1", {}, {"positions": POSITIONS}),
    "all_options": (
        "T1",
        {"window_size": 7, **attention(num_kv_heads=2, qk_norm=True, logit_soft_cap=2.0,
                                       sink="learned")},
        {"key_bias": BIAS},
    ),
    "delta": ("g1G1", {}, {}),
    "delta_sizes": (
        "g1", {"delta": GatedDeltaNetConfig(num_heads=3, head_dim=5, expand_v=1, d_conv=2)}, {},
    ),
    "mlstm": (
        "l1L1", {"mlstm": MLSTMConfig(num_heads=4, key_dim=3, input_gate_bias=0.0)}, {},
    ),
    "cross_last": ("x1t1", grouped(relation="last_closed"), {"memory": MEMORY}),
    "cross_equal": ("X1", grouped(window=2), {"memory": MEMORY}),
    "cross_ring": ("x1", grouped(window=2), {"memory": NUMBERED}),
    "cross_all": ("x1", grouped(window=-1), {"memory": NUMBERED}),
    "mixed": ("m1g1T1", {"window_size": 5}, {}),
}  # fmt: skip
# `all_options` has what these have, `mixed` the layers of others; what each option computes is
# compared with loops below.
REPEATED = ("kv_heads", "qk_norm", "soft_cap", "sink_learned", "key_bias", "delta_sizes", "mixed")
EACH = pytest.mark.few("name", [name for name in STACKS if name not in REPEATED], [*STACKS])


def configured(layout, fields, **compute) -> HNetConfig:
    one = replace(stage("t1", D), **fields)  # only a decoder has layers x
    compute = replace(COMPUTE, delta_block_len=8, **compute)
    return replace(network(one), compute=compute)


@cache
def build(name: str, causal: bool = True, dtype: str = "float32"):
    """(structure, parameters) of a stack"""
    layout, fields, _ = STACKS[name]
    config = configured(layout, fields, dtype=dtype)
    return split(config, layout, causal)


def split(config, layout, causal=True):
    make = lambda: Isotropic(
        config, config.stages[0], layout, num_residuals=2, causal=causal, rngs=nnx.Rngs(0)
    )
    graph, shapes = nnx.split(nnx.eval_shape(make))
    return graph, drawn(nnx.to_pure_dict(shapes), seed=3)


def context(name: str, segments) -> Context:
    given = STACKS[name][2]
    memory = given.get("memory")
    return Context(
        jnp.asarray(segments), given.get("positions"), given.get("key_bias"),
        memory=memory and memory._replace(x_GMND=jnp.asarray(memory.x_GMND)),
    )  # fmt: skip


def _run(graph, params, x, context):
    return nnx.merge(graph, params)(x, context)


run = quick_jit(_run, static_argnums=0)
run_as_people_do = optimized_jit(_run, static_argnums=0)
AS_PEOPLE_DO = ("all_options", "cross_equal", "delta")  # the others without optimizations


def forward(name, x=X, segments=SEGMENTS, causal=True):
    return np.asarray(run(*build(name, causal), x, context(name, segments)))


# --- what every mixer must satisfy --------------------------------------------------------------


def test_every_letter_is_here():
    assert {letter.lower() for layout, *_ in STACKS.values() for letter in layout} - set(
        "0123456789"
    ) == set(MIXERS)


@EACH
def test_causality_bit_for_bit(name):
    graph, params = build(name)
    beside = context(name, SEGMENTS)
    call = run_as_people_do if name in AS_PEOPLE_DO else run
    before = np.asarray(call(graph, params, X, beside))
    for t in (8, 20):
        changed = X.copy()
        changed[:, t:] += np.float32(0.5)
        after = np.asarray(call(graph, params, changed, beside))
        assert np.array_equal(before[:, :t].view(np.uint32), after[:, :t].view(np.uint32))
        assert np.all(np.any(before[:, t] != after[:, t], axis=-1))


@EACH
def test_a_stack_counts_itself(name):
    """All parameters; at least the product of each position with each matrix that it passes."""
    graph, params = build(name)
    layout, fields, given = STACKS[name]
    sizes = {path: leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    parts = count(partial(_run, graph), params, X, context(name, SEGMENTS))
    matrices = sum(size for path, size in sizes.items() if path[-1].key == "kernel")
    vectors = B * (MEMORY.x_GMND.shape[1] if "memory" in given else L)
    assert sum(cost.matmul for cost in parts.values()) >= 2 * vectors * matrices
    if "memory" not in given:  # a network has it in the decoder of a stage that chunks only
        config = configured(layout, fields)
        whole = replace(config, stages=(replace(config.stages[0], arch_layout=(layout,)),))
        assert param_counts(whole)["stage0/main_network"] == sum(sizes.values())


@EACH
def test_a_segment_does_not_notice_its_neighbours(name):
    """The second segment of row 1, in its row and as a separate row."""
    whole, own = forward(name), np.where(np.arange(L) < 7, 1, 0) * np.ones_like(SEGMENTS)
    # all rows begin with what row 1 has from position 9 on; after the segment is padding
    moved = lambda a: None if a is None else np.roll(a, -9, axis=1)[[1, 1, 1]]
    given, memory = context(name, own), None
    if given.memory:
        x, query_group, *others = (a if a is None else np.asarray(a) for a in given.memory)
        memory = Memory(x[[1, 1, 1]], moved(query_group), *others)
    separate = given._replace(
        positions_BL=moved(given.positions_BL), key_bias_BL=moved(given.key_bias_BL), memory=memory
    )
    out = run(*build(name), moved(X), separate)
    np.testing.assert_allclose(out[0, :7], whole[1, 9:16], rtol=0, atol=2e-5)


@EACH
def test_gradients_are_finite_and_stay_within_a_segment(name):
    graph, params = build(name)

    def scalar(x, params):
        return jnp.sum(_run(graph, params, x, context(name, SEGMENTS))[1, 9:16])

    dx, dparams = jax.device_get(quick_jit(jax.grad(scalar, (0, 1)))(X, params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(dparams):
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), path
    assert np.all(np.isfinite(dx)) and np.all(np.any(dx[1, 9:16] != 0, axis=-1))
    assert (
        np.all(dx[1, :9] == 0)
        and np.all(dx[1, 16:] == 0)
        and np.all(dx[0] == 0)
        and np.all(dx[2] == 0)
    )


def step(graph, params, x, caches, positions, first, rotary, bias, memory):
    rows = Rows(jnp.arange(B, dtype=jnp.int32), are_all=True)
    now = StepContext(positions, first, rotary, bias, memory)
    return nnx.merge(graph, params).step(x, caches, rows, now)


step = quick_jit(step, static_argnums=0)


def _prefill(graph, params, x, context, lengths):
    return nnx.merge(graph, params).prefill(x, context, lengths, L)


prefill = quick_jit(_prefill, static_argnums=0)


def streamed(name: str, scopes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The outputs of prefill up to `lengths`, then of single steps."""
    graph, params = build(name)
    after = np.arange(L)[None] >= lengths[:, None]
    beside = context(name, np.where(after, 0, scopes))
    out, caches = prefill(graph, params, X, beside, lengths)
    out = np.array(out)
    starts = np.diff(scopes, axis=1, prepend=0) != 0
    first = np.maximum.accumulate(np.where(starts, np.arange(L), 0), axis=1)
    for i in range(L - lengths.min()):
        t = np.minimum(lengths + i, L - 1)
        at = lambda a, t=t: None if a is None else np.asarray(a)[np.arange(B), t]
        memory = beside.memory and beside.memory._replace(
            query_group_BL=at(beside.memory.query_group_BL)[:, None]
        )
        y, caches = step(
            graph, params, at(X), caches, t.astype(np.int32),
            None if np.all(scopes == 1) else at(first).astype(np.int32),
            at(beside.positions_BL), at(beside.key_bias_BL), memory,
        )  # fmt: skip
        live = lengths + i < L
        out[live, t[live]] = np.asarray(y)[live]
    return out


# one row of CHUNKS below is one scope
ONE_SCOPE = ["mamba2", "attention", "all_options", "delta", "mlstm", "cross_last"]


@pytest.mark.few("name", ONE_SCOPE, [*STACKS])
def test_steps_are_the_forward_pass(name, monkeypatch):
    monkeypatch.setattr(nn_cache, "KV_BLOCK", 4)  # so that a row's keys fill several blocks
    lengths = np.int32([0, 5, 17])
    out = streamed(name, ONE, lengths)
    np.testing.assert_allclose(out, forward(name, segments=ONE), rtol=0, atol=1e-5)


@EACH
@pytest.mark.few("lengths", [(18, 4, 11)], [(0, 0, 0), (11, 4, 2), (18, 3, 11)])
def test_steps_of_a_scope_that_starts_again_are_the_forward_pass(name, lengths, monkeypatch):
    """Also if the prompt ends inside a scope, or with one."""
    monkeypatch.setattr(nn_cache, "KV_BLOCK", 4)
    out = streamed(name, CHUNKS, np.int32(lengths))
    np.testing.assert_allclose(out, forward(name, segments=CHUNKS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["all_options", "delta", "mlstm", "cross_equal", "mamba2"])
def test_bfloat16_stays_near(name):
    graph, params = build(name, dtype="bfloat16")
    half = run(graph, params, X, context(name, SEGMENTS))
    assert half.dtype == jnp.float32
    assert 1e-4 < relative_error(half, forward(name)) < 0.1


MESH = ["all_options", "delta", "mlstm", "cross_equal", "mamba2"]


@pytest.mark.few("name", MESH, [*MESH, "kv_heads", "key_bias", "sink_learned"])
def test_a_mesh_changes_nothing(name):
    """Parameters are sharded by their axes, rows over two devices, heads over two."""
    graph, params = build(name)
    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    shardings = state_shardings(params, describe(nnx.merge(graph, params)), mesh)
    is_cut = [any(s.spec) for s in jax.tree.leaves(shardings)]
    assert sum(is_cut) >= 2
    x = X[:2]
    beside = jax.tree.map(lambda a: a[:2], context(name, SEGMENTS))

    def on_mesh(params, x, beside):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return _run(graph, params, x, beside)

    whole = NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.device_put(params, shardings), *jax.device_put((x, beside), whole)
    np.testing.assert_allclose(quick_jit(on_mesh)(*placed), forward(name)[:2], rtol=0, atol=2e-5)


# --- attention ----------------------------------------------------------------------------------


def numpy_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale


def numpy_attention(name, causal=True):
    """A stack of one attention layer without an MLP, in float64."""
    layout, fields, given = STACKS[name]
    config = configured(layout, fields).stages[0]
    params = jax.tree.map(np.float64, build(name, causal)[1])
    layer = jax.tree.map(lambda a: a[0], params["layers"][0])
    mixer, options, H = layer["mixer"], config.attention, config.num_heads
    widths = np.cumsum([D, D // H * (options.num_kv_heads or H)])
    qkv = numpy_norm(X, layer["norm1"]["scale"]) @ mixer["Wqkv"]["kernel"]
    q, k, v = (a.reshape(B, L, -1, D // H) for a in np.split(qkv, widths, axis=-1))
    if options.qk_norm:
        q, k = numpy_norm(q, mixer["q_norm"]["scale"]), numpy_norm(k, mixer["k_norm"]["scale"])
    starts = np.diff(SEGMENTS, axis=1, prepend=-1) != 0
    first = np.maximum.accumulate(np.where(starts, np.arange(L), 0), axis=1)
    positions = given.get("positions", np.arange(L)[None] - first)
    q, k = (oracles.rotary(a, positions, config.rotary_emb_dim) for a in (q, k))
    sink = {"none": None, "one": np.zeros(H), "learned": mixer.get("sink")}[options.sink]
    out = oracles.attention(
        q, k, v, SEGMENTS, config.window_size, causal=causal, bias_BL=given.get("key_bias"),
        sink_H=sink, cap=options.logit_soft_cap,
    )  # fmt: skip
    x = X + out.reshape(B, L, D) @ mixer["out_proj"]["kernel"]
    return numpy_norm(x, params["rmsnorm"]["scale"])


@pytest.mark.parametrize("name", ["kv_heads", "qk_norm", "soft_cap", "sink_one", "positions"])
@pytest.mark.parametrize("causal", [True, False])
def test_options_of_attention_are_those_of_the_loop(name, causal):
    """Sinks per head and key biases: tests/nn/test_attention.py, and by steps above."""
    out = forward(name, causal=causal)
    assert relative_error(out, numpy_attention(name, causal)) < 3e-6
    assert relative_error(out, forward(name, causal=not causal)) > 1e-2


def test_no_kernel_is_chosen_that_would_leave_an_option_out(monkeypatch):
    """A kernel that computes garbage changes only plain attention."""
    broken = table.Kernel(lambda q, k, v, segments, *, window: 0 * q, "cpu")
    monkeypatch.setitem(table.KERNELS["attention_backend"], "cudnn", broken)
    for name, (layout, fields, _) in STACKS.items():
        if layout[0] not in "tT":
            continue
        graph, _ = split(configured(layout, fields, attention_backend="cudnn"), layout)
        out = run(graph, build(name)[1], X, context(name, SEGMENTS))
        knows = name in ("attention", "kv_heads", "qk_norm", "positions")
        assert (relative_error(out, forward(name)) > 1e-2) == knows, name
        if name != "attention":
            continue
        graph, params = split(configured(layout, fields), layout, causal=False)
        plain = run(graph, params, X, context(name, SEGMENTS))
        graph, _ = split(configured(layout, fields, attention_backend="cudnn"), layout, False)
        assert np.array_equal(run(graph, params, X, context(name, SEGMENTS)), plain)


def test_mamba2_with_kernels_around_its_ssd_is_that_of_array_code(monkeypatch):
    """Interpreted; the values of a stack, and its gradients."""
    triton = table.KERNELS["ssd_backend"]["triton"]
    around = table.AroundSSD(*(partial(f, interpret=True) for f in triton.around))
    ssd = partial(triton.run, interpret=True)
    interpreted = triton._replace(run=ssd, block_len=16, around=around)
    monkeypatch.setitem(table.KERNELS["ssd_backend"], "triton", interpreted)
    graphs = [split(configured("m1", {}, ssd_backend=name), "m1")[0] for name in ("triton", "xla")]
    params, row = split(configured("m1", {}), "m1")[1], slice(1, 2)  # a row of three segments

    def values(graph):
        def weighted(params):
            out = _run(graph, params, X[row], context("mamba2", SEGMENTS[row]))
            return jnp.sum(out * BIAS[row, :, None]), out

        return quick_jit(jax.grad(weighted, has_aux=True))(params)

    for a, b in zip(*(jax.tree.leaves(values(graph)) for graph in graphs), strict=True):
        assert relative_error(a, b) < 3e-5


def test_a_stack_that_looks_ahead_is_only_attention_and_has_no_steps():
    for name in ("mamba2", "delta", "mlstm", "mixed"):
        with pytest.raises(
            ConfigError, match="layers '[mgl]' are causal: a stack that looks ahead"
        ):
            build(name, causal=False)
    graph, params = build("attention", causal=False)
    with pytest.raises(ValueError, match="looks ahead .* has no streaming form"):
        _prefill(graph, params, X, context("attention", ONE), np.int32([1, 1, 1]))


def test_key_biases_are_given_always_or_never():
    graph, params = build("attention")
    _, caches = prefill(graph, params, X, context("attention", ONE), np.int32([3, 3, 3]))
    with pytest.raises(ValueError, match="key biases are given in all of prefill and steps"):
        step(graph, params, X[:, 3], caches, np.int32([3, 3, 3]), None, None, BIAS[:, 3], None)


# --- gated DeltaNet -----------------------------------------------------------------------------


def test_gated_deltanet_is_the_loop():
    """The layer of the paper's figure 1, in float64."""
    name = "delta_sizes"
    H, K, V = 3, 5, 5
    params = jax.tree.map(np.float64, build(name)[1])
    layer = jax.tree.map(lambda a: a[0], params["layers"][0])
    mixer = layer["mixer"]
    x = numpy_norm(X, layer["norm1"]["scale"])
    q, k, v, gate, a, b = (
        part for proj in ("qk_proj", "vg_proj", "ab_proj")
        for part in np.split(x @ mixer[proj]["kernel"], 2, axis=-1)
    )  # fmt: skip
    taps = mixer["conv1d_weight"]
    taps = np.split(taps, [H * K, 2 * H * K], axis=-1)
    q, k, v = (
        oracles.causal_conv_silu(p, w, np.zeros(w.shape[-1]), SEGMENTS).reshape(B, L, H, -1)
        for p, w in zip((q, k, v), taps)
    )
    q, k = (p / np.sqrt(np.sum(p**2, -1, keepdims=True) + 1e-6) for p in (q, k))
    log_alpha = -np.exp(mixer["A_log"]) * np.log1p(np.exp(a + mixer["dt_bias"]))
    y = oracles.gated_delta(q / np.sqrt(K), k, v, log_alpha, 1 / (1 + np.exp(-b)), SEGMENTS)
    y = numpy_norm(y, mixer["norm"]["scale"]).reshape(B, L, H * V) * gate / (1 + np.exp(-gate))
    out = numpy_norm(X + y @ mixer["out_proj"]["kernel"], params["rmsnorm"]["scale"])
    assert relative_error(forward(name), out) < 5e-6


# --- mLSTM --------------------------------------------------------------------------------------


def test_mlstm_is_the_loop():
    """The layer of the paper's figure 2, in float64; its recurrence: tests/nn/test_mlstm.py."""
    params = jax.tree.map(np.float64, build("mlstm")[1])
    layer, H = jax.tree.map(lambda a: a[0], params["layers"][0]), 4
    mixer = layer["mixer"]
    x = numpy_norm(X, layer["norm1"]["scale"])
    q, k, v, gate = (
        part for proj in ("qk_proj", "vo_proj")
        for part in np.split(x @ mixer[proj]["kernel"], 2, axis=-1)
    )  # fmt: skip
    q, k, v = (a.reshape(B, L, H, -1) for a in (q, k, v))
    capped = 15 * np.tanh((x @ mixer["gate_proj"]["kernel"] + mixer["gate_bias"]) / 15)
    y = oracles.mlstm(q, k, v, *np.split(capped, 2, axis=-1), SEGMENTS)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    y = y.reshape(gate.shape) * mixer["norm_scale"] / (1 + np.exp(-gate))
    assert relative_error(run_first("mlstm"), X + y @ mixer["out_proj"]["kernel"]) < 5e-6


# --- cross-attention ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "relation", "window"),
    [("cross_last", "last_closed", 1), ("cross_ring", "equal", 2), ("cross_all", "equal", -1)],
)
def test_cross_attention_is_the_loop(name, relation, window):
    """Gathered by position, and masked over a ring of groups."""
    params = jax.tree.map(np.float64, build(name)[1])
    memory = STACKS[name][2]["memory"]
    groups = np.arange(5)[None].repeat(B, 0) if memory.group_GM is None else memory.group_GM
    groups = np.where(groups < 0, -9, groups).repeat(2, axis=1)
    layer = jax.tree.map(lambda a: a[0], params["layers"][0])
    mixer, heads = layer["mixer"], D // 13
    q = numpy_norm(X, layer["norm1"]["scale"]) @ mixer["Wq"]["kernel"]
    kv = numpy_norm(memory.x_GMND, mixer["memory_norm"]["scale"]) @ mixer["Wkv"]["kernel"]
    q, k, v = (a.reshape(B, -1, heads, 13) for a in (q, *np.split(kv, 2, axis=-1)))
    out = oracles.grouped_attention(
        q, k, v, memory.query_group_BL, groups, np.ones((B, L, 10), bool), relation, window,
    )  # fmt: skip
    x = X + out.reshape(B, L, D) @ mixer["out_proj"]["kernel"]
    first = run_first(name)
    assert relative_error(first, x) < 3e-6


def run_first(name):
    """Output of the first layer."""
    graph, params = build(name)
    block = nnx.merge(graph, params).layers[0]
    block = nnx.merge(*(lambda g, p: (g, jax.tree.map(lambda a: a[0], p)))(*nnx.split(block)))
    return block(X, context(name, SEGMENTS))


@pytest.mark.parametrize("name", ["cross_equal", "cross_all"])
def test_memory_of_other_documents_is_not_read(name):
    """Documents of positions are those of the context, or those that the memory says."""
    graph, params = build(name)
    documents = np.int32([[1, 1, 2, 2, 2]] * B)
    segments = np.where(MEMORY.query_group_BL > 1, 2, 1).astype(np.int32)
    memory = MEMORY._replace(segment_ids_GM=documents)
    before = run(graph, params, X, Context(segments, memory=memory))
    chunks = Context(CHUNKS + 5, memory=memory._replace(query_segment_ids_BL=segments))
    assert np.array_equal(before, run(graph, params, X, chunks))
    beside = Context(segments, memory=memory)
    x_GMND = np.where(documents[..., None, None] == 1, np.float32(9), MEMORY.x_GMND)
    changed = beside._replace(memory=memory._replace(x_GMND=x_GMND))
    same = np.all(np.asarray(before) == run(graph, params, X, changed), axis=-1)
    assert np.all(same[segments == 2]) and not np.all(same)


def test_rows_may_share_a_memory():
    graph, params = build("cross_equal")
    separate = run(graph, params, X[:2], Context(ONE[:2], memory=MEMORY._replace(
        x_GMND=MEMORY.x_GMND[:1].repeat(2, 0), query_group_BL=MEMORY.query_group_BL[:2]
    )))  # fmt: skip
    one = Context(ONE[:2], memory=Memory(MEMORY.x_GMND[:1], MEMORY.query_group_BL[:2]))
    np.testing.assert_allclose(run(graph, params, X[:2], one), separate, rtol=0, atol=1e-6)


def test_cross_attention_without_memory_says_so():
    graph, params = build("cross_last")
    with pytest.raises(ValueError, match="layers x and X read a memory: give context.memory"):
        _run(graph, params, X, Context(SEGMENTS))


# --- the table ----------------------------------------------------------------------------------


class Doubling(Mixer):
    """A custom mixer."""

    def __init__(self, config, stage, *, out_std, causal, rngs):
        self.width = stage.d_model

    @staticmethod
    def problem(config, stage):
        return "d_model=1: use another" if stage.d_model == 1 else None

    def __call__(self, x_BLD, context):
        return x_BLD


def test_a_class_of_ones_own_is_a_letter():
    mine = (("k", f"{__name__}:Doubling"),)
    config = HNetConfig((StageConfig(("k1",), D),), mixers=mine)
    stack = Isotropic(config, config.stages[0], "k1", num_residuals=1, rngs=nnx.Rngs(0))
    assert isinstance(stack.layers[0].mixer, Doubling)
    out = numpy_norm(X + numpy_norm(np.float64(X), 1), 1)
    assert relative_error(stack(X, Context(SEGMENTS)), out) < 1e-6
    with pytest.raises(ConfigError, match="model.stages.0.d_model=1: use another"):
        HNetConfig((StageConfig(("k1",), 1),), mixers=mine)


WRONG = [
    ((("Q", "a:B"),), "m1", "model.mixers has 'Q': use one lower-case letter"),
    ((("t", "a:B"),), "m1", "model.mixers: letter 't' is taken: use another than g, l, m, t, x"),
    ((("q", "a:B"), ("q", "a:C")), "m1", "letter 'q' is taken"),
    ((("q", "a.B"),), "m1", "model.mixers has 'a.B': use package.module:Class"),
    ((("q", "no_such.module:B"),), "q1", "arch_layout=.* mixer 'no_such.module:B' cannot be imp"),
    ((("q", "hnet.nn.isotropic:Block"),), "q1", "mixer 'hnet.nn.isotropic:Block' is no subclass"),
    ((), "q1", r"stages.0.arch_layout=\('q1',\): letter 'q' is unknown: use g, l, m, t, x \(upper"),
]


@pytest.mark.parametrize("mixers, layout, says", WRONG)
def test_a_wrong_letter_is_one_line(mixers, layout, says):
    with pytest.raises(ConfigError, match=says) as error:
        HNetConfig((StageConfig((layout,), 64),), mixers=mixers)
    assert "\n" not in str(error.value)


REFUSED = [
    ("t1", attention(num_kv_heads=3), "attention.num_kv_heads=3 does not divide num_heads=16: use"),
    ("t1", attention(num_kv_heads=-1), "attention.num_kv_heads=-1: use 0 or more"),
    ("T1", attention(logit_soft_cap=-1.0), "attention.logit_soft_cap=-1.0: use 0 or more"),
    ("x1", {"num_heads": 16}, "arch_layout=.* has layers 'x' outside of a decoder"),
    ("x1", {"num_heads": 5}, "d_model=64 is not divided by num_heads=5: choose"),
    ("x1", grouped(window=0), "cross_attention.window=0: use 1 or more, or -1"),
    (
        "x1",
        {"cross_attention": CrossAttentionConfig(memory_width=-1)},
        "memory_width=-1: use 0 or more",
    ),
    ("g1", {"delta": GatedDeltaNetConfig(num_heads=5)}, "d_model=64 is not divided by the 5 heads"),
    ("g1", {"num_heads": 0}, "d_model=64 is not divided by the 0 heads of layers g"),
    ("l1", {"mlstm": MLSTMConfig(num_heads=5)}, "d_model=64 is not divided by the 5 heads of lay"),
    ("l1", {"mlstm": MLSTMConfig(gate_soft_cap=-1.0)}, "gate_soft_cap=-1.0: use 0 or more"),
    ("g1", {"delta": GatedDeltaNetConfig(expand_v=0)}, "delta.expand_v=0: use 1 or more"),
]


@pytest.mark.parametrize("layout, fields, says", REFUSED)
def test_settings_that_cannot_work_are_one_line(layout, fields, says):
    with pytest.raises(ConfigError, match=f"model.stages.0.*{says}") as error:
        HNetConfig((StageConfig((layout,), 64, 128, **{"rotary_emb_dim": 4, **fields}),))
    assert "\n" not in str(error.value)


DECODERS = [
    ("m1", {"dechunk": "cross_attention"}, 0, "dechunk='cross_attention', but the decoder 'm1'"),
    ("x1", {}, 48, "cross_attention.memory_width=48 does not divide the 64 channels per chunk"),
]


@pytest.mark.parametrize("decoder, chunking, width, says", DECODERS)
def test_chunk_vectors_without_a_reader_or_of_another_width_are_one_line(
    decoder, chunking, width, says
):
    outer = StageConfig(
        ("m1", decoder), 64, rotary_emb_dim=4, chunking=ChunkingConfig(**chunking),
        cross_attention=CrossAttentionConfig(memory_width=width),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=f"model.stages.0.*{says}") as error:
        HNetConfig((outer, StageConfig(("m1",), 64)))
    assert "\n" not in str(error.value)


UNOFFICIAL = [
    ("g1", {}, r"model.stages.0.arch_layout=\('g1',\) has layers 'g'"),
    ("m1G1", {}, "has layers 'G'"),
    ("t1", attention(num_kv_heads=2), "model.stages.0.attention.num_kv_heads=2 has no official"),
    ("t1", attention(qk_norm=True), "attention.qk_norm=True has no official form"),
    ("t1", attention(sink="one"), "attention.sink='one' has no official form"),
    ("t1", attention(logit_soft_cap=9.0), "attention.logit_soft_cap=9.0 has no official form"),
]


@pytest.mark.parametrize("layout, fields, says", UNOFFICIAL)
def test_the_official_form_refuses_by_name_what_it_cannot_say(layout, fields, says):
    from hnet.weights.official import check_official

    config = HNetConfig((StageConfig((layout,), 64, 128, rotary_emb_dim=4, **fields),))
    for refuse in (HNetConfig.to_json, check_official):
        with pytest.raises(ConfigError, match=says) as error:
            refuse(config)
        assert "keep this model in its work directory" in str(error.value)
    unused = HNetConfig((StageConfig(("m1",), 64, **attention(sink="one")),))
    check_official(unused)
