"""Operations counted in a traced program: each kind of equation, by hand and by XLA."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from hnet.cost import Cost, count, trips
from hnet.errors import ConfigError

A = jax.ShapeDtypeStruct((7, 11), jnp.float32)
B = jax.ShapeDtypeStruct((11, 13), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((5, 5), jnp.float32)
ONE = 2 * 5 * 5 * 5  # a product of two squares


def square(x):
    with jax.named_scope("work"):
        return x @ x


def matmul(function, *args):
    (cost,) = count(function, *args).values()
    return cost.matmul


def test_a_product_counts_two_operations_for_each_multiplication():
    assert count(jnp.matmul, A, B) == {"other": Cost(matmul=2 * 7 * 11 * 13)}
    batched = partial(jnp.einsum, "bij,bkj->bik")
    x, y = (jax.ShapeDtypeStruct((3, n, 5), jnp.float32) for n in (7, 11))
    assert count(batched, x, y) == {"other": Cost(matmul=2 * 3 * 7 * 11 * 5)}


def test_products_at_the_highest_precision_are_told_apart():
    exact = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    both = count(lambda a, b: exact(a, b) + a @ b, A, B)["other"]
    assert both.exact == both.matmul / 2 == 2 * 7 * 11 * 13


@pytest.mark.parametrize("groups", [1, 3])
def test_convolutions(groups):
    x = jax.ShapeDtypeStruct((2, 6, 17), jnp.float32)
    kernel = jax.ShapeDtypeStruct((9, 6 // groups, 5), jnp.float32)
    convolve = partial(
        lax.conv_general_dilated, window_strides=(1,), padding="VALID", feature_group_count=groups
    )
    assert matmul(convolve, x, kernel) == 2 * (2 * 9 * 13) * (6 // groups) * 5


ELEMENTWISE = {
    "add": lambda x: x + 1,
    "compare": lambda x: x > 0,
    "select": lambda x: jnp.where(x > 0, x, 0.0),
    "clip": lambda x: jnp.clip(x, 0, 1),
    "sum": lambda x: jnp.sum(x, axis=0),
    "max": lambda x: jnp.max(x, axis=0),
    "mean of squares": lambda x: jnp.mean(jnp.square(x), axis=0),
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "softmax": partial(jax.nn.softmax, axis=0),
    "exp": jnp.exp,
    "log1p": jnp.log1p,
    "tanh": jnp.tanh,
    "rsqrt": lax.rsqrt,
    "moved": lambda x: jnp.concatenate([x.T[::-1, :50], x.T[:, 3:]], axis=1).reshape(-1),
    "gathered": lambda x: x[jnp.arange(0, 101, 2)],
    "rotated": lambda x: x * jnp.cos(x) + jnp.sin(x),
    "added to rows": lambda x: x.at[jnp.arange(97)].add(x[:97]),
}


@pytest.mark.parametrize("function", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_elementwise_operations_are_those_of_xla(function):
    x = jax.ShapeDtypeStruct((101, 103), jnp.float32)
    counted = count(function, x).get("other", Cost()).total / (101 * 103)
    xla = (jax.jit(function).lower(x).cost_analysis() or {}).get("flops", 0.0) / (101 * 103)
    assert counted == pytest.approx(xla, rel=0.02, abs=0.05)


def test_scopes_name_the_parts():
    def inner(x):
        with jax.named_scope("pool"):
            x = square(x)  # a scope within a part is the part's
        with jax.named_scope("stage1"), jax.named_scope("main_network"):
            return jnp.einsum("ij,jk->ik", x, x)

    def model(x):
        with jax.named_scope("stage0"):
            x = inner(x @ x)
        with jax.named_scope("head"):
            return x @ x @ x

    assert count(model, SQUARE) == {
        "stage0": Cost(ONE),
        "stage0/pool": Cost(ONE),
        "stage1/main_network": Cost(ONE),
        "head": Cost(2 * ONE),
    }
    grad = count(jax.value_and_grad(lambda x: jnp.sum(model(x))), SQUARE)
    for part in ("stage0", "stage0/pool", "stage1/main_network"):
        assert grad[part].matmul == 3 * ONE
    again = count(jax.value_and_grad(lambda x: jnp.sum(jax.checkpoint(model)(x))), SQUARE)
    assert again.keys() == grad.keys() and again["stage0/pool"].matmul == 4 * ONE


def test_bodies_count_as_often_as_they_run():
    scan = lambda x: lax.scan(lambda x, _: (square(x), None), x, length=7)[0]
    assert matmul(scan, SQUARE) == 7 * ONE
    nested = lambda x: lax.fori_loop(0, 3, lambda _, x: scan(x), x)
    assert matmul(nested, SQUARE) == 21 * ONE
    assert matmul(jax.jit(nested), SQUARE) == 21 * ONE
    assert matmul(jax.vmap(scan), jax.ShapeDtypeStruct((4, 5, 5), jnp.float32)) == 28 * ONE
    assert (
        matmul(lambda x: lax.map(square, x), jax.ShapeDtypeStruct((4, 5, 5), jnp.float32))
        == 4 * ONE
    )


def test_the_dearest_branch_counts():
    cheap = lambda x: lax.cond(x[0, 0] > 0, square, lambda x: square(square(x)), x)
    assert count(cheap, SQUARE)["work"].matmul == 2 * ONE


def test_rules_of_derivatives_count_for_what_they_compute():
    @jax.custom_vjp
    def twice(x):
        return square(square(x))

    twice.defvjp(lambda x: (twice(x), x), lambda x, dy: (dy @ x,))
    assert matmul(twice, SQUARE) == 2 * ONE

    def loss(x):
        with jax.named_scope("twice"):
            return jnp.sum(twice(x))

    assert count(jax.value_and_grad(loss), SQUARE)["twice"].matmul == 3 * ONE
    linear = jax.custom_jvp(square)
    linear.defjvp(lambda primals, tangents: (square(*primals), primals[0] @ tangents[0]))
    assert matmul(linear, SQUARE) == ONE


def test_what_is_not_used_is_not_counted():
    def wasteful(x):
        square(square(x))
        return square(x)

    assert matmul(wasteful, SQUARE) == ONE


def test_a_loop_with_bounds_of_the_run_states_its_trips():
    def loop(n, x):
        with jax.named_scope("stage0"), jax.named_scope("dechunk"):
            return lax.fori_loop(0, n, lambda _, x: x @ x, x)

    n = jax.ShapeDtypeStruct((), jnp.int32)
    with pytest.raises(ConfigError, match="stage0/dechunk.*trips"):
        count(loop, n, SQUARE)

    def stated(n, x):
        with trips(2.5):
            x = loop(n, x)
            with trips(3):
                return loop(n, x)

    assert count(stated, n, SQUARE)["stage0/dechunk"].matmul == 5.5 * ONE


def test_each_device_counts_its_share():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=auto)
    spec = jax.P("data")
    rows = jax.ShapeDtypeStruct((8, 5, 5), jnp.float32)
    share = jax.shard_map(jax.vmap(square), mesh=mesh, in_specs=spec, out_specs=spec)
    # replicated over `tensor`: computed twice
    assert matmul(share, rows) == 2 * 8 * ONE


def test_a_kernel_counts_its_grid():
    from jax.experimental import pallas as pl

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] @ x_ref[...]

    block = pl.BlockSpec((None, 5, 5), lambda i: (i, 0, 0))
    rows = jax.ShapeDtypeStruct((8, 5, 5), jnp.float32)
    run = pl.pallas_call(kernel, rows, grid=(8,), in_specs=[block], out_specs=block)
    assert matmul(run, rows) == 8 * ONE
