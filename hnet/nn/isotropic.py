"""A stack of residual blocks from a layout string: (B, L, D) -> (B, L, D)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.errors import ConfigError
from hnet.layout import parse_layout
from hnet.nn.cache import Rows
from hnet.nn.context import Context, StepContext, apart, together
from hnet.nn.layers import INIT_STD, MATMUL, RMSNorm, SwiGLU, constrain_rows
from hnet.nn.mixers import find
from hnet.nn.settings import SharedConfig, StackConfig
from hnet.nn.stack import Stack


class Block(nnx.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)) for upper-case letters; x is float32."""

    def __init__(
        self, config: SharedConfig, stage: StackConfig, kind: str, *, out_std: float,
        causal: bool = True, rngs: nnx.Rngs,
    ):  # fmt: skip
        mixer = find(kind, config.mixers)
        if not (causal or mixer.can_look_ahead):
            raise ConfigError(
                f"layers {kind!r} are causal: a stack that looks ahead cannot have any"
            )
        self.norm1 = RMSNorm(stage.d_model)
        self.mixer = mixer(config, stage, out_std=out_std, causal=causal, rngs=rngs)
        self.has_mlp = kind.isupper()
        if self.has_mlp:
            self.norm2 = RMSNorm(stage.d_model)
            self.mlp = SwiGLU(
                stage.d_model, stage.d_mlp, out_std=out_std, dtype=config.compute.dtype,
                inputs=config.compute.inputs, rngs=rngs,
            )  # fmt: skip

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        mixed = self.mixer(self.norm1(x_BLD), context)
        return self.feed_forward(x_BLD + mixed.astype(jnp.float32))

    def prefill(
        self, x_BLD: jax.Array, context: Context, lengths_B: jax.Array, max_len: int
    ) -> tuple[jax.Array, Any]:
        mixed, cache = self.mixer.prefill(self.norm1(x_BLD), context, lengths_B, max_len)
        return self.feed_forward(x_BLD + mixed.astype(jnp.float32)), cache

    def step(
        self, x_RVD: jax.Array, cache: Any, at: tuple, context: StepContext
    ) -> tuple[jax.Array, Any]:
        mixed, cache = self.mixer.step(self.norm1(x_RVD), cache, at, context)
        return self.feed_forward(x_RVD + mixed.astype(jnp.float32)), cache

    def feed_forward(self, x_BLD: jax.Array) -> jax.Array:
        if not self.has_mlp:
            return x_BLD
        return x_BLD + self.mlp(self.norm2(x_BLD)).astype(jnp.float32)


class Isotropic(Stack):
    """Blocks of one width, then an RMSNorm.

    `layers[r]` is run r of the layout ("T1m4" has two runs), with parameters stacked along a
    leading layer axis, so that each run is one scan. A position of several vectors (`vectors`) is
    as many neighbouring entries in the layers.
    """

    def __init__(
        self,
        config: SharedConfig,
        stage: StackConfig,
        layout: str,
        *,
        num_residuals: int,
        causal: bool = True,
        rngs: nnx.Rngs,
    ):
        """num_residuals: number of residual additions; output projections are initialised with a
        standard deviation divided by its square root.

        causal: False: every position sees its whole segment; such a stack has no `step`. Raises
        ConfigError for a mixer that does not support this.
        """
        self.runs, self.compute, self.causal = parse_layout(layout), config.compute, causal
        self.vectors, stage = stage.vectors, stage.of_one_vector
        self.is_apart = False  # whether caches have no layer axis, see `hnet.decode.apart`
        out_std = INIT_STD / math.sqrt(max(num_residuals, 1))

        def make_run(kind, count):
            @nnx.split_rngs(splits=count)
            @nnx.vmap(in_axes=0, out_axes=0)
            def make(rngs):
                return Block(config, stage, kind, out_std=out_std, causal=causal, rngs=rngs)

            return make(rngs)

        self.layers = nnx.List([make_run(kind, count) for kind, count in self.runs])
        self.rmsnorm = RMSNorm(stage.d_model)

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        x_BLD, context = apart(x_BLD.astype(jnp.float32), context, self.vectors)
        for (_, count), run in zip(self.runs, self.layers):
            graph, params = nnx.split(run)
            params = _in_compute_dtype(run, params)

            def layer(x, p, graph=graph):
                return constrain_rows(nnx.merge(graph, p)(constrain_rows(x), context)), None

            layer = _rematerialised(layer, self.compute.remat)
            unroll = 1 if self.compute.scan_layers else count
            x_BLD, _ = jax.lax.scan(layer, x_BLD, params, unroll=unroll)
        return together(self.rmsnorm(x_BLD), self.vectors)

    def prefill(
        self, x_BLD: jax.Array, context: Context, lengths_B: jax.Array, max_len: int
    ) -> tuple[jax.Array, list]:
        """`__call__`, and one cache per run with room for `max_len` positions per row.

        Segment ids are 0 from lengths_B on; later steps continue the last segment before that.
        Layers apart run one by one: a scan would copy their weights and caches.
        """
        self._check_causal()
        x_BLD, context = apart(x_BLD.astype(jnp.float32), context, self.vectors)
        lengths_B, max_len, caches = self.vectors * lengths_B, self.vectors * max_len, []
        for run in self.layers:
            graph, params = nnx.split(run)

            def layer(x, p, graph=graph):
                return nnx.merge(graph, p).prefill(x, context, lengths_B, max_len)

            if self.is_apart:
                x_BLD, cache = layer(x_BLD, jax.tree.map(lambda a: a[0], params))
            else:
                x_BLD, cache = jax.lax.scan(layer, x_BLD, params)
            caches.append(cache)
        return together(self.rmsnorm(x_BLD), self.vectors), caches

    def step(
        self, x_RD: jax.Array, caches: list, rows: Rows, context: StepContext
    ) -> tuple[jax.Array, list]:
        """The next position of some rows.

        The scan carries the caches instead of slicing them, so that XLA updates them in place. A
        run of one layer needs no scan (`hnet.decode.apart`).
        """
        self._check_causal()
        x_RVD = x_RD.astype(jnp.float32).reshape(len(x_RD), self.vectors, -1)
        new_caches = []
        for (_, count), run, cache in zip(self.runs, self.layers, caches):
            graph, params = nnx.split(run)

            def layer(carry, inputs, graph=graph):
                x, cache = carry
                p, i = inputs
                return nnx.merge(graph, p).step(x, cache, (i, rows), context), None

            if count == 1:
                only = jax.tree.map(lambda a: a[0], params)
                (x_RVD, cache), _ = layer((x_RVD, cache), (only, None if self.is_apart else 0))
            else:
                index = jnp.arange(count, dtype=jnp.int32)
                (x_RVD, cache), _ = jax.lax.scan(layer, (x_RVD, cache), (params, index))
            new_caches.append(cache)
        return self.rmsnorm(x_RVD).reshape(x_RD.shape), new_caches

    def _check_causal(self) -> None:
        if not self.causal:
            raise ValueError("a stack that looks ahead (causal=False) has no streaming form")


def _in_compute_dtype(run: Block, params: nnx.State) -> nnx.State:
    """`params` with the weights of linear layers in the dtype of their products.

    Converted here once, instead of in every pass over every layer; the gradients of the layers are
    then stacked in this dtype too, in which the products give them.
    """
    narrow = {
        (*path, "kernel"): module.dtype
        for path, module in nnx.iter_modules(run)
        if isinstance(module, nnx.Linear) and module.dtype != module.param_dtype
    }
    flat = dict(nnx.to_flat_state(params))
    for path, dtype in narrow.items():
        flat[path] = flat[path].replace(flat[path][...].astype(dtype))
    return nnx.from_flat_state(flat) if narrow else params


def _rematerialised(layer, remat: str):
    if remat == "none":
        return layer
    saved = jax.checkpoint_policies.save_only_these_names(MATMUL) if remat == "dots" else None
    return jax.checkpoint(layer, policy=saved, prevent_cse=False)
