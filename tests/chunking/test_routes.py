"""Routers with parameters per route: results, cost, communication."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hnet.chunking import routes
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.predictors.cosine import Cosine
from hnet.chunking.predictors.mlp import MLP
from hnet.chunking.routes import apply_routed, keep_absent, pack_by_route
from hnet.model import abstract
from hnet.nn.parameters import describe
from hnet.stage import make_predictor
from tests.chunking_pieces import place, previous
from tests.networks import network, quick_jit, random_params, stage

R, D = 5, 7


def randomised(router: nnx.Module, seed: int) -> nnx.Module:
    rng = np.random.default_rng(seed)
    graph, params = nnx.split(router)
    noise = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), params)
    return nnx.merge(graph, noise)


def data_mesh(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def routers(kind: str, routes: int) -> nnx.Module:
    settings = MLP.Config(width=11) if kind == "mlp" else kind
    alignment = "end" if kind == "mlp" else "start"
    chunking = ChunkingConfig(predictor=settings, alignment=alignment, routes=routes)
    return randomised(make_predictor(chunking, place(D, chunking), rngs=nnx.Rngs(0)), routes)


def inputs_of(kind: str, x_BLD):
    return (previous(x_BLD), x_BLD) if kind == "cosine" else (x_BLD,)


@given(st.data())
@settings(max_examples=60)
def test_every_position_has_a_place_of_its_own_in_a_block_of_its_route(data):
    N, T = data.draw(st.sampled_from([(1, 8), (23, 2), (23, 8)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    ids = np.sort(rng.integers(0, R, N)) if data.draw(st.booleans()) else rng.integers(0, R, N)
    pack = quick_jit(pack_by_route, static_argnums=(1, 2))
    source, place, route = jax.device_get(pack(ids.astype(np.int32), R, T))
    assert len(set(place)) == N and place.max() < source.size
    assert np.array_equal(source.reshape(-1)[place], np.arange(N))
    assert np.sum(source < N) == N
    assert np.array_equal(route[place // T], ids)
    changed = ids.copy()
    cut = data.draw(st.integers(0, N))
    changed[cut:] = rng.integers(0, R, N - cut)
    assert np.array_equal(place[:cut], pack(changed.astype(np.int32), R, T).place_N[:cut])


WAYS = [(0, 0), (0, 2**23), (1, 0), (3, 2**23), (3, 0)]


@pytest.mark.few(
    "kind, devices, together",
    [*[("cosine", *way) for way in WAYS], ("mlp", 0, 0), ("mlp", 3, 2**23)],
    [(kind, *way) for kind in ("cosine", "mlp") for way in WAYS],
)
def test_routed_router_is_the_router_of_each_positions_route(kind, devices, together, monkeypatch):
    """Without a mesh and on one; blocks one after the other, and side by side."""
    monkeypatch.setattr(routes, "SIDE_BY_SIDE", together)
    rng = np.random.default_rng(0)
    B, L = 3, 31
    x = rng.normal(size=(B, L, D)).astype(np.float32)
    ids = rng.choice([0, 1, 2, 4], (B, L)).astype(np.int32)  # route 3 is absent
    weights = rng.normal(size=(B, L)).astype(np.float32)
    graph, params = nnx.split(routers(kind, R))

    def routed(params, x):
        mesh = data_mesh(devices).abstract_mesh if devices else jax.sharding.get_abstract_mesh()
        with jax.sharding.use_abstract_mesh(mesh):
            out = apply_routed(nnx.merge(graph, params), R, ids, *inputs_of(kind, x))
        return jnp.sum(out * weights), out

    single, _ = nnx.split(routers(kind, 1))

    def every_route(params, x):
        one = lambda p: nnx.merge(single, p).score(*inputs_of(kind, x))
        out_RBL = jax.vmap(one)(params)
        out = jnp.take_along_axis(out_RBL, ids[None], axis=0)[0]
        return jnp.sum(out * weights), out

    both = quick_jit(jax.value_and_grad(routed, (0, 1), has_aux=True))
    placed = jax.device_put((params, x), NamedSharding(data_mesh(devices or 1), PartitionSpec()))
    (_, out), grads = both(*placed)
    slow = quick_jit(jax.value_and_grad(every_route, (0, 1), has_aux=True))
    (_, expected), expected_grads = slow(params, x)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for leaf, expected_leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads)):
        np.testing.assert_allclose(leaf, expected_leaf, atol=2e-4)
    for leaf in jax.tree.leaves(grads[0]):
        assert np.all(leaf[3] == 0), "a route without positions has no gradient at all"
        assert np.any(leaf[4] != 0)


@pytest.mark.parametrize("kind", ["cosine", "mlp"])
def test_one_route_is_the_plain_router(kind):
    """Same parameters, names and shapes, and the same bits out."""
    plain = Cosine(Cosine.Config(), place(D), rngs=nnx.Rngs(0))
    if kind == "mlp":
        plain = MLP(MLP.Config(width=11), place(D), rngs=nnx.Rngs(0))
    one = routers(kind, 1)
    shapes = lambda m: jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.split(m)[1]))
    assert shapes(one) == shapes(plain)
    x = np.random.default_rng(0).normal(size=(2, 5, D)).astype(np.float32)
    out = apply_routed(one, 1, None, *inputs_of(kind, x))
    assert np.array_equal(out, one.score(*inputs_of(kind, x)))
    many = shapes(routers(kind, R))
    assert (
        jax.tree.map(lambda s: (R, *s), shapes(plain), is_leaf=lambda s: isinstance(s, tuple))
        == many
    )


def dot_flops(jaxpr) -> int:
    """Operations of all matmuls; those in loops count once per iteration."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += (
                2 * equation.outvars[0].aval.size * int(np.prod([shape[i] for i in contracted]))
            )
        inside = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        bodies = [value for value in inside if hasattr(value, "eqns")]
        total += equation.params.get("length", 1) * sum(dot_flops(body) for body in bodies)
    return total


@pytest.mark.few(
    "kind, together",
    [("cosine", 0), ("mlp", 2**23)],
    [(kind, together) for kind in ("cosine", "mlp") for together in (0, 2**23)],
)
def test_sixteen_routes_cost_little_more_than_one(kind, together, monkeypatch):
    """Counted, not timed: every route at every position would be 16 times one."""
    monkeypatch.setattr(routes, "SIDE_BY_SIDE", together)
    x = jnp.zeros((2, 256, D), jnp.float32)
    ids = jnp.zeros((2, 256), jnp.int32)

    def flops(routes):
        graph, params = nnx.split(routers(kind, routes))
        run = lambda p, x: apply_routed(nnx.merge(graph, p), routes, ids, *inputs_of(kind, x)).sum()
        both = jax.make_jaxpr(jax.value_and_grad(run, (0, 1)))(params, x)
        return dot_flops(both.jaxpr)

    one = flops(1)
    assert one > 3 * 2 * 512 * D * D
    # a loop computes the forward pass again for the gradient: 4 thirds of the matmuls
    assert one < flops(16) < 1.8 * one


def test_routing_on_a_sharded_batch_moves_nothing_but_gradients():
    mesh = data_mesh(8)
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    graph, params = nnx.split(routers("mlp", R))
    ids = jax.ShapeDtypeStruct((16, 13), jnp.int32, sharding=rows)
    x = jax.ShapeDtypeStruct((16, 13, D), jnp.float32, sharding=rows)

    def run(params, ids, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return apply_routed(nnx.merge(graph, params), R, ids, x)

    def gradients(params, ids, x):
        return jax.grad(lambda p, x: run(p, ids, x).sum(), (0, 1))(params, x)

    def moves(function, out):
        jitted = quick_jit(function, in_shardings=(whole, rows, rows), out_shardings=out)
        text = jitted.lower(params, ids, x).compile().as_text()
        kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
        return re.findall(rf" ({kinds})(?:-start)?\(", text)

    assert moves(run, rows) == []
    found = moves(gradients, (whole, rows))
    assert set(found) == {"all-reduce"}
    assert len(found) <= len(jax.tree.leaves(params))


def routed_network(**chunking):
    outer = replace(stage("t1 t1", 26), chunking=ChunkingConfig(target_ratio=3.0, routes=3))
    middle = replace(stage("t1 t1", 26), chunking=ChunkingConfig(target_ratio=2.0, routes=3))
    core = stage("t1", 26)
    return network(replace(outer, chunking=replace(outer.chunking, **chunking)), middle, core)


@pytest.mark.parametrize(
    "chunking", [{}, dict(predictor="mlp", alignment="end", pool="mean", routed_parameters=False)],
    ids=["start", "end"],
)  # fmt: skip
def test_a_chunk_has_the_route_of_the_position_on_which_it_fires(chunking):
    graph, params = random_params(routed_network(**chunking))
    rng = np.random.default_rng(4)
    ids = rng.integers(0, 256, (2, 23)).astype(np.int32)
    routes = rng.integers(0, 3, (2, 23)).astype(np.int32)
    segments = np.repeat([[1, 2]], 2, 0).repeat([9, 14], axis=1).astype(np.int32)
    run = quick_jit(lambda p: nnx.merge(graph, p)(ids, segments, route_ids_BL=routes)[1])
    outer, inner = jax.device_get(run(params))
    assert np.array_equal(outer.route_ids_BL, routes)
    for b in range(2):
        expected = []
        for t in range(23):
            if chunking and t in (0, 9):
                expected.append(routes[b, t])  # for the null chunk
            if outer.boundary_mask_BL[b, t]:
                expected.append(routes[b, t])
        used = inner.segment_ids_BL[b] != 0
        assert len(expected) == used.sum() > 6
        assert np.array_equal(inner.route_ids_BL[b][used], expected)


@pytest.mark.parametrize(
    "chunking", [{}, dict(predictor="mlp", routed_parameters=False)], ids=["cosine", "mlp"]
)
def test_an_offset_moves_the_logit_of_its_route_and_gets_no_gradient(chunking):
    graph, params = random_params(routed_network(**chunking, hold_rate=True))
    ids = np.random.default_rng(5).integers(0, 256, (2, 23)).astype(np.int32)
    routes = ids % 3

    @quick_jit
    def first_stage(offset_R):
        def run(offset_R):
            backbone = {**params["backbone"], "boundary_offset": offset_R}
            model = nnx.merge(graph, {**params, "backbone": backbone})
            p_BL = model(ids, route_ids_BL=routes)[1][0].boundary_prob_BL
            return jnp.sum(p_BL), p_BL

        (_, p_BL), grad_R = jax.value_and_grad(run, has_aux=True)(offset_R)
        return p_BL[:, 1:], grad_R

    logit = lambda p: np.log(p) - np.log1p(-np.asarray(p, np.float64))
    offset_R = np.float32([1.5, 0.0, -0.7])
    (before, _), (after, grad_R) = first_stage(np.zeros(3, np.float32)), first_stage(offset_R)
    moved = logit(after) - logit(before)
    np.testing.assert_allclose(moved, offset_R[routes[:, 1:]], atol=1e-3)
    assert np.all(grad_R == 0)


def test_route_ids_are_demanded_and_cut_to_the_routes_there_are():
    graph, params = random_params(routed_network())
    ids = np.arange(46, dtype=np.int32).reshape(2, 23)
    model = nnx.merge(graph, params)
    with pytest.raises(ValueError, match="3 routes: give route_ids_BL"):
        model(ids)
    run = quick_jit(lambda p, r: nnx.merge(graph, p)(ids, route_ids_BL=r)[0])
    beyond, last = (np.full((2, 23), r, np.int32) for r in (99, 2))
    assert np.array_equal(run(params, beyond), run(params, last))


def test_absent_routes_keep_parameters_and_moments():
    graph, params = abstract(routed_network())
    infos = describe(nnx.merge(graph, params))
    old = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), params)
    new = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), params)
    counts = np.asarray([[4, 0, 1], [0, 2, 0]], np.float32)
    for wrap in (lambda tree: tree, lambda tree: {"mu": tree, "count": np.ones((), np.int32)}):
        kept = jax.device_get(keep_absent(wrap(new), wrap(old), infos, counts))
        inside = kept.get("mu", kept)["backbone"]
        outer = inside["routing_module"]["q_proj_layer"]["kernel"]
        inner = inside["main_network"]["routing_module"]["k_proj_layer"]["kernel"]
        assert [leaf.mean() for leaf in outer] == [1, 0, 1]
        assert [leaf.mean() for leaf in inner] == [0, 1, 0]
        rest = [a for path, a in jax.tree_util.tree_leaves_with_path(kept)
                if "routing_module" not in jax.tree_util.keystr(path)]  # fmt: skip
        assert len(rest) > 10 and all(np.all(a == 1) for a in rest)
    graph, params = abstract(routed_network(routed_parameters=False))
    infos = describe(nnx.merge(graph, params))
    old, new = (jax.tree.map(lambda a, n=n: np.full(a.shape, n, a.dtype), params) for n in (0, 1))
    shared = jax.device_get(keep_absent(new, old, infos, counts))["backbone"]
    assert shared["routing_module"]["q_proj_layer"]["kernel"].min() == 1
    assert shared["main_network"]["routing_module"]["q_proj_layer"]["kernel"].min() == 0
