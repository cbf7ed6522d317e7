"""Boundary predictors with parameters per route (script group), at the cost of one predictor.

With R > 1 routes every parameter has a leading axis of size R; with one route it has none.
Positions are packed into blocks of one route each, and each block uses its route's parameters.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.nn.kernels.sharded import sharded_over_rows
from hnet.nn.parameters import ParameterInfo, map_parameters, set_per_script

BLOCKS_PER_ROUTE = 4  # at most 5 R blocks in all, so at most a fifth of the places is unused
MIN_BLOCK = 8
# Below this many elements (inputs plus per-block parameter copies) use vmap, which is faster than a
# scan on a CPU (`experiments.benchmarks.routing`); above it a scan: vmap would copy too much.
SIDE_BY_SIDE = 2**23


def stack_routes(make: Callable[[nnx.Rngs], nnx.Module], routes: int, rngs: nnx.Rngs) -> nnx.Module:
    """`make(rngs)`; for several routes one module each, parameters stacked on a leading axis."""
    if routes == 1:
        return make(rngs)
    stacked = nnx.split_rngs(splits=routes)(nnx.vmap(make, in_axes=0, out_axes=0))
    module = stacked(rngs)
    set_per_script(module)
    return module


class Blocks(NamedTuple):
    """N positions packed into K blocks of T."""

    source_KT: jax.Array
    """position in each place; N in unused places"""
    place_N: jax.Array
    """place k * T + t of each position"""
    route_K: jax.Array
    """route of each block"""


def pack_by_route(route_ids_N: jax.Array, num_routes: int, block_len: int) -> Blocks:
    """Assign every position a place in a block of its own route.

    The first position that needs a block opens it, so a position's place depends only on earlier
    positions: later positions cannot change a bit of its result.
    """
    (N,), T = route_ids_N.shape, block_len
    num_blocks = min(N, (N + num_routes * (T - 1)) // T)
    own_NR = route_ids_N[:, None] == jnp.arange(num_routes, dtype=jnp.int32)[None, :]
    count_NR = jnp.cumsum(own_NR, axis=0, dtype=jnp.int32)
    rank_N = jnp.sum(jnp.where(own_NR, count_NR, 0), axis=1, dtype=jnp.int32) - 1
    opens_N = rank_N % T == 0
    opened_N = jnp.cumsum(opens_N, dtype=jnp.int32) - 1
    target_N = jnp.where(opens_N, opened_N, num_blocks)
    route_K = jnp.zeros((num_blocks,), jnp.int32).at[target_N].set(route_ids_N, mode="drop")
    nth_N = jnp.where(opens_N, rank_N // T, N)
    block_RQ = jnp.zeros((num_routes, -(-N // T)), jnp.int32)
    block_RQ = block_RQ.at[route_ids_N, nth_N].set(opened_N, mode="drop")
    place_N = block_RQ[route_ids_N, rank_N // T] * T + rank_N % T
    source = jnp.full((num_blocks * T,), N, jnp.int32)
    source = source.at[place_N].set(jnp.arange(N, dtype=jnp.int32), unique_indices=True)
    return Blocks(source.reshape(num_blocks, T), place_N, route_K)


def _row_by_row(position_KT: jax.Array, B: int, L: int) -> jax.Array:
    """Convert indices into (L, B) to indices into (B, L); B * L (unused) stays B * L."""
    along_KT = position_KT % B * L + position_KT // B
    return jnp.where(position_KT < B * L, along_KT, B * L)


@jax.custom_vjp
def _into_blocks(x_BLD: jax.Array, source_KT: jax.Array, place_BL: jax.Array) -> jax.Array:
    """State in each place (K, T, D), 0 in unused places.

    Every position has exactly one place, so the gradient is a gather. JAX would scatter, which
    XLA's CPU backend does one row at a time.
    """
    x_ND = x_BLD.reshape(-1, x_BLD.shape[-1])
    return x_ND.at[source_KT].get(mode="fill", fill_value=0)


def _into_blocks_bwd(place_BL, grad_KTD):
    return grad_KTD.reshape(-1, grad_KTD.shape[-1])[place_BL], None, None


_into_blocks.defvjp(
    lambda x, source, place: (_into_blocks(x, source, place), place), _into_blocks_bwd
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _for_each_block(run, params: Any, route_K: jax.Array, inputs_KTD: list[jax.Array]) -> jax.Array:
    """Scan `run(params of the block's route, inputs of the block)` over the blocks, (K, T).

    The custom gradient adds to one route per block; JAX's would add an array of all routes.
    """

    def one_block(_, block):
        route, inputs_TD = block
        return None, run(_of_route(params, route), inputs_TD)

    return jax.lax.scan(one_block, None, (route_K, inputs_KTD))[1]


def _of_route(params, route):
    return jax.tree.map(lambda stacked: stacked[route], params)


def _for_each_block_fwd(run, params, route_K, inputs_KTD):
    return _for_each_block(run, params, route_K, inputs_KTD), (params, route_K, inputs_KTD)


def _for_each_block_bwd(run, saved, grad_KT):
    params, route_K, inputs_KTD = saved

    def one_block(total, block):
        route, inputs_TD, grad_T = block
        _, transpose = jax.vjp(run, _of_route(params, route), inputs_TD)
        grad_params, grad_inputs_TD = transpose(grad_T)
        return jax.tree.map(lambda t, g: t.at[route].add(g), total, grad_params), grad_inputs_TD

    zeros = jax.tree.map(jnp.zeros_like, params)
    grad_params, grad_inputs = jax.lax.scan(one_block, zeros, (route_K, inputs_KTD, grad_KT))
    return grad_params, None, grad_inputs


_for_each_block.defvjp(_for_each_block_fwd, _for_each_block_bwd)


def apply_routed(
    module: nnx.Module, num_routes: int, route_ids_BL: jax.Array | None, *inputs_BLD: jax.Array
) -> jax.Array:
    """`module.score(*inputs)` (B, L), each position with the parameters of its route.

    module: made by `stack_routes`; `score` maps inputs (..., D) to (...). Each device of the mesh
    packs its own rows, so only gradients of parameters are communicated. With one route this is a
    plain call.
    """
    if num_routes == 1:
        return module.score(*inputs_BLD)
    graph, params = nnx.split(module)
    leaves, tree = jax.tree.flatten(params)
    num_inputs = len(inputs_BLD)

    def run(own_params, inputs_TD):
        return nnx.merge(graph, own_params).score(*inputs_TD)

    def own_rows(route_ids_BL, *arrays):
        inputs_BLD, leaves = arrays[:num_inputs], arrays[num_inputs:]
        (B, L), N = route_ids_BL.shape, route_ids_BL.size
        block_len = max(MIN_BLOCK, -(-N // (BLOCKS_PER_ROUTE * num_routes)))
        # Pack in the order of positions, all rows at once, so that packing is causal in every row.
        blocks = pack_by_route(route_ids_BL.T.reshape(N), num_routes, block_len)
        place_BL = blocks.place_N.reshape(L, B).T
        source_KT = _row_by_row(blocks.source_KT, B, L)
        packed = [_into_blocks(x, source_KT, place_BL) for x in inputs_BLD]
        params = jax.tree.unflatten(tree, leaves)
        route_K = blocks.route_K
        copies = route_K.size * sum(leaf[0].size for leaf in leaves)
        if copies + sum(x.size for x in packed) <= SIDE_BY_SIDE:
            out_KT = jax.vmap(run)(_of_route(params, route_K), packed)
        else:
            out_KT = _for_each_block(run, params, route_K, packed)
        return out_KT.reshape(-1)[place_BL]

    axes = ("BL", *["BLD"] * num_inputs, *["R" + "D" * (leaf.ndim - 1) for leaf in leaves])
    return sharded_over_rows(own_rows, axes, "BL", route_ids_BL, *inputs_BLD, *leaves)


def keep_absent(new: Any, old: Any, infos: Any, count_SR: jax.Array) -> Any:
    """`new`, but with the values of `old`, bit for bit, for routes without positions.

    new, old: parameters after and before an update, or trees that contain them, such as an
    optimizer state. infos: `hnet.nn.parameters.describe` of the model. count_SR: positions per
    stage and route in the update. Neither weight decay nor momentum then changes an absent route.
    """

    def choose(info: ParameterInfo, new_leaf, old_leaf):
        if not info.per_script:
            return new_leaf
        R = len(new_leaf)
        present_R = (count_SR[info.stage, :R] > 0).reshape(R, *(1,) * (new_leaf.ndim - 1))
        return jnp.where(present_R, new_leaf, old_leaf)

    return map_parameters(choose, infos, new, old)
