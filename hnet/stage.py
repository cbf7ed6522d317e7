"""The one recursion: encoder -> route -> chunk -> main network -> dechunk -> decoder."""

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.chunk import chunk
from hnet.chunking.dechunk import dechunk
from hnet.chunking.router import RouterOutput, RoutingModule, decide
from hnet.config import HNetConfig, layout_height
from hnet.nn.isotropic import Isotropic


class HNet(nnx.Module):
    """Stage `stage_idx` and all stages inside it: (B, L, D) -> (B, L, D).

    D is the width of the stage outside; a wider stage widens its input by a learned vector and
    returns the first D channels. The main network is another HNet or, innermost, a plain stack.
    """

    def __init__(self, config: HNetConfig, stage_idx: int = 0, *, outer: int = 0, rngs: nnx.Rngs):
        """`outer`: residual additions in the encoders and decoders of the stages around."""
        stage = config.stages[stage_idx]
        num_residuals = outer + sum(layout_height(part) for part in stage.arch_layout)

        def stack(layout):
            return Isotropic(config, stage, layout, num_residuals=num_residuals, rngs=rngs)

        self.stage_idx = stage_idx
        self.is_innermost = stage_idx == config.num_chunked
        padding = stage.d_model - config.stages[max(stage_idx - 1, 0)].d_model
        self.pad_dimension = nnx.Param(jnp.zeros((padding,), jnp.float32)) if padding else None
        if self.is_innermost:
            self.main_network = stack(stage.arch_layout[0])
            return
        self.encoder = stack(stage.arch_layout[0])
        self.decoder = stack(stage.arch_layout[1])
        self.routing_module = RoutingModule(stage.d_model, rngs=rngs)
        # zeros, so that at first the encoder learns through the main network; the official bias
        # keeps torch's random default, which looks like an oversight and changes nothing else
        self.residual_proj = nnx.Linear(
            stage.d_model, stage.d_model, kernel_init=nnx.initializers.zeros,
            precision=jax.lax.Precision.HIGHEST, rngs=rngs,
        )  # fmt: skip
        self.main_network = HNet(config, stage_idx + 1, outer=num_residuals, rngs=rngs)

    def widen(self, x_BLD: jax.Array) -> jax.Array:
        if self.pad_dimension is None:
            return x_BLD
        pad_BLP = jnp.broadcast_to(self.pad_dimension[...], (*x_BLD.shape[:2], *self.pad_dimension.shape))
        return jnp.concatenate([x_BLD, pad_BLP], axis=-1)

    def __call__(
        self, x_BLD: jax.Array, segment_ids_BL: jax.Array, capacities: tuple[int | None, ...]
    ) -> tuple[jax.Array, list[RouterOutput]]:
        """`capacities[i]`: chunk slots a row of the i-th stage from here; None = as many as
        positions. Returns the output in float32 and what each stage's router decided, this first.
        """
        outer_width = x_BLD.shape[-1]
        x_BLD = self.widen(x_BLD)
        if self.is_innermost:
            with jax.named_scope("main_network"):
                return self.main_network(x_BLD, segment_ids_BL)[..., :outer_width], []

        with jax.named_scope("encoder"):
            h_BLD = self.encoder(x_BLD, segment_ids_BL)
        with jax.named_scope("residual_proj"):
            residual_BLD = self.residual_proj(h_BLD)
        with jax.named_scope("routing_module"):
            capacity = min(capacities[0] or x_BLD.shape[1], x_BLD.shape[1])
            route = decide(self.routing_module(h_BLD, segment_ids_BL), segment_ids_BL, capacity)
        with jax.named_scope("chunk"):
            chunks = chunk(
                h_BLD, route.boundary_mask_BL, route.boundary_prob_BL, segment_ids_BL, capacity
            )
        with jax.named_scope(f"stage{self.stage_idx + 1}"):
            y_BMD, inner = self.main_network(chunks.x_BMD, chunks.segment_ids_BM, capacities[1:])
        with jax.named_scope("dechunk"):
            x_BLD = dechunk(y_BMD, chunks, route) + residual_BLD
        with jax.named_scope("decoder"):
            return self.decoder(x_BLD, segment_ids_BL)[..., :outer_width], [route, *inner]
