"""Stacks of layers: scanned or not, recomputed or not, in float32 or bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from tests.golden_data import relative_error
from tests.networks import NETWORKS, network, quick_jit, random_params, stage, with_compute

STACK = network(stage("m2t2", 26, window=7))
L = 19
rng = np.random.default_rng(0)
IDS = rng.integers(0, 256, (2, L)).astype(np.int32)
SEGMENTS = np.stack([np.repeat([1, 2], [8, 11]), np.repeat([1, 0], [15, 4])]).astype(np.int32)
COTANGENT = np.float32(rng.normal(size=(2, L, 256)))
_, PARAMS = random_params(STACK)


def scalar_of(config):
    graph, _ = random_params(config)

    def scalar(params):
        logits, _ = nnx.merge(graph, params)(IDS, SEGMENTS)
        return jnp.sum(logits * COTANGENT), logits

    return scalar


def logits_and_gradient(config):
    return quick_jit(jax.grad(scalar_of(config), has_aux=True))(PARAMS)[::-1]


@pytest.fixture(scope="module")
def plain():
    return logits_and_gradient(STACK)


HOW = [{"scan_layers": False}, {"remat": "layer"}, {"remat": "dots"}]


@pytest.mark.few("fields", HOW[:2], HOW)
def test_how_it_is_computed_does_not_change_it(plain, fields):
    logits, grads = logits_and_gradient(with_compute(STACK, **fields))
    np.testing.assert_allclose(logits, plain[0], rtol=0, atol=2e-6)
    paths = jax.tree_util.tree_leaves_with_path(grads)
    for (path, ours), reference in zip(paths, jax.tree.leaves(plain[1])):
        assert relative_error(ours, reference) < 1e-5, path


def test_scanned_layers_are_one_body():
    """The program for four equal layers is as long as that for two."""

    def lines(layout, **fields):
        config = with_compute(network(stage(layout, 26)), **fields)
        program = jax.make_jaxpr(scalar_of(config))(random_params(config)[1])
        return str(program).count("dot_general")

    assert lines("t4") == lines("t2")
    unrolled = str(jax.make_jaxpr(scalar_of(with_compute(STACK, scan_layers=False)))(PARAMS))
    assert "unroll=2" in unrolled


def test_rematerialisation_keeps_less_for_the_backward_pass():
    def kept(remat):
        scalar = scalar_of(with_compute(STACK, remat=remat))
        pull_back = jax.eval_shape(lambda p: jax.vjp(scalar, p, has_aux=True)[1], PARAMS)
        return sum(leaf.size for leaf in jax.tree.leaves(pull_back))

    assert kept("layer") < kept("dots") < 0.8 * kept("none")


def test_bfloat16_stays_near_and_parameters_stay_float32(plain):
    logits, grads = logits_and_gradient(with_compute(STACK, dtype="bfloat16"))
    assert logits.dtype == jnp.float32
    assert 1e-4 < relative_error(logits, plain[0]) < 0.05
    for ours, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(plain[1])):
        assert ours.dtype == jnp.float32
        assert relative_error(ours, reference) < 0.15


def equations(jaxpr, scope=""):
    """(named scopes, equation) of a program and all programs inside it."""
    for equation in jaxpr.eqns:
        where = f"{scope}/{equation.source_info.name_stack}"
        yield where, equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, where)


@pytest.mark.parametrize("name", [n for n, c in NETWORKS.items() if c.num_chunked])
def test_bfloat16_stops_at_router_residual_dechunk_and_head(name):
    """In the traced program nothing in these scopes is bfloat16, and matmuls elsewhere are.

    Pools and dechunks with weights of their own have matmuls too.
    """
    config = with_compute(NETWORKS[name], dtype="bfloat16")
    graph, params = random_params(config)
    ids = jnp.zeros((1, 8), jnp.int32)

    def run(params, ids):
        logits, routes = nnx.merge(graph, params)(ids, route_ids_BL=ids)
        return logits, [route.boundary_prob_BL for route in routes]

    program = jax.make_jaxpr(run)(params, ids)
    assert all(out.dtype == jnp.float32 for out in program.out_avals)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = " ".join(jax.tree_util.keystr(path) for path, _ in leaves)
    exact = {"routing_module", "residual_proj"}
    exact |= {scope for scope in ("chunk", "dechunk") if f"'{scope}_layer'" not in paths}
    half = {"encoder": 0, "decoder": 0}
    for scopes, equation in equations(program.jaxpr):
        innermost = scopes.rsplit("/stage", 1)[-1].split("/")
        is_half = any(getattr(v.aval, "dtype", None) == jnp.bfloat16 for v in equation.outvars)
        for scope in exact:
            assert not (scope in innermost and is_half), equation
        for scope in half:
            half[scope] += (
                scope in innermost and is_half and equation.primitive.name == "dot_general"
            )
    assert min(half.values()) > 0
