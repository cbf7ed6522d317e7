"""The one recursion: encoder -> route -> chunk -> main network -> dechunk -> decoder."""

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.chunk import Chunks, chunk
from hnet.chunking.dechunk import dechunk
from hnet.chunking.pool import mean_pool
from hnet.chunking.router import (
    RouterOutput,
    decide,
    make_router,
    pack_rows,
    previous,
    relaxed_bernoulli,
    shift_logit,
)
from hnet.chunking.routes import apply_routed
from hnet.chunking.rules import fixed
from hnet.config import HNetConfig, layout_height
from hnet.nn.context import Context
from hnet.nn.isotropic import Isotropic
from hnet.nn.parameters import metadata, parameter, set_stage


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

        self.stage_idx, self.chunking = stage_idx, stage.chunking
        self.is_innermost = stage_idx == config.num_chunked
        padding = stage.d_model - config.stages[max(stage_idx - 1, 0)].d_model
        self.pad_dimension = (
            parameter(jnp.zeros((padding,), jnp.float32), "channels") if padding else None
        )
        if self.is_innermost:
            self.main_network = stack(stage.arch_layout[0])
            set_stage(self, stage_idx)
            return
        self.encoder = stack(stage.arch_layout[0])
        self.decoder = stack(stage.arch_layout[1])
        self.routing_module = make_router(stage.chunking, stage.d_model, rngs=rngs)
        # of each route on the logit of p; set by the controller, not by a gradient
        self.boundary_offset = (
            parameter(jnp.zeros((stage.chunking.routes,), jnp.float32), "script", decay=False)
            if stage.chunking.hold_rate
            else None
        )
        # zeros, so that at first the encoder learns through the main network; the official bias
        # keeps torch's random default, which looks like an oversight and changes nothing else
        self.residual_proj = nnx.Linear(
            stage.d_model, stage.d_model, kernel_init=nnx.initializers.zeros,
            precision=jax.lax.Precision.HIGHEST, rngs=rngs,
            kernel_metadata=metadata("embed out"), bias_metadata=metadata("out", decay=False),
        ) if stage.chunking.residual == "linear" else None  # fmt: skip
        self.null_group = (
            parameter(jax.random.normal(rngs.params(), (stage.d_model,), jnp.float32), "channels")
            if stage.chunking.has_null
            else None
        )
        self.main_network = HNet(config, stage_idx + 1, outer=num_residuals, rngs=rngs)
        set_stage(self, stage_idx)  # of all but the main network, which has its own

    def widen(self, x_BLD: jax.Array) -> jax.Array:
        if self.pad_dimension is None:
            return x_BLD
        pad_BLP = jnp.broadcast_to(
            self.pad_dimension[...], (*x_BLD.shape[:2], *self.pad_dimension.shape)
        )
        return jnp.concatenate([x_BLD, pad_BLP], axis=-1)

    def residual(self, h_BLD: jax.Array) -> jax.Array:
        """What passes by the main network, float32."""
        return h_BLD if self.residual_proj is None else self.residual_proj(h_BLD)

    def offset(self, route_ids_BL: jax.Array | None) -> jax.Array | None:
        """The controller's offset on the logit of p, for each position if routes are told apart."""
        if self.boundary_offset is None:
            return None
        offset_R = jax.lax.stop_gradient(self.boundary_offset[...])
        return offset_R[0] if self.chunking.routes == 1 else offset_R[route_ids_BL]

    def route(
        self,
        h_BLD: jax.Array,
        segment_ids_BL: jax.Array,
        capacity: int,
        *,
        route_ids_BL: jax.Array | None = None,
        boundaries_BL: jax.Array | None = None,
        key: jax.Array | None = None,
        temperature: jax.Array | None = None,
        packed_rows: int = 1,
    ) -> RouterOutput:
        """Where this stage cuts its encoder states, which are float32; arguments as in `HNetLM`."""
        chunking, compared_BL, logit_BL = self.chunking, None, None

        def learned(*inputs_BLD):
            return apply_routed(
                self.routing_module, chunking.num_predictors, route_ids_BL, *inputs_BLD
            )

        offset = self.offset(route_ids_BL)
        match chunking.router:
            case "cosine":
                p_BL = learned(previous(h_BLD), h_BLD)
                if offset is not None:
                    p_BL = shift_logit(p_BL, offset)
            case "mlp":
                logit_BL = learned(h_BLD)
                if offset is not None:
                    logit_BL = logit_BL + offset
                p_BL = jax.nn.sigmoid(logit_BL)
                if chunking.sample == "relaxed":
                    if key is None and chunking.reference_noise_at_evaluation:
                        key = jax.random.key(0)
                    if key is not None:
                        key = jax.random.fold_in(key, self.stage_idx)
                    tau = chunking.temperature if temperature is None else temperature
                    compared_BL = relaxed_bernoulli(logit_BL, tau, key)
            case "fixed":
                p_BL = fixed(segment_ids_BL, int(chunking.target_ratio)).astype(jnp.float32)
            case _:  # rules of bytes, and boundaries handed in
                p_BL = boundaries_BL.astype(jnp.float32)
        return decide(
            p_BL, segment_ids_BL, capacity,
            alignment=chunking.alignment, compared_BL=compared_BL, boundary_logit_BL=logit_BL,
            route_ids_BL=route_ids_BL, packed_rows=packed_rows,
        )  # fmt: skip

    def chunk(self, h_BLD: jax.Array, route: RouterOutput, capacity: int) -> Chunks:
        """Pool the encoder states of each chunk into its slot."""
        if self.chunking.pool == "mean":
            b_BL = route.boundary_BL
            if self.chunking.sample == "threshold":
                b_BL = jax.lax.stop_gradient(b_BL)
            h_BLD = mean_pool(h_BLD, b_BL, route.boundary_mask_BL, route.segment_ids_BL)
        null_D = None if self.null_group is None else self.null_group[...]
        return chunk(h_BLD, route, capacity, null_D)

    def __call__(
        self,
        x_BLD: jax.Array,
        segment_ids_BL: jax.Array,
        capacities: tuple[int | None, ...],
        *,
        packed_rows: int = 1,
        route_ids_BL: jax.Array | None = None,
        boundaries_BL: jax.Array | None = None,
        key: jax.Array | None = None,
        temperature: jax.Array | None = None,
    ) -> tuple[jax.Array, list[RouterOutput]]:
        """`capacities[i]`: slots that the i-th stage from here has for each `packed_rows` rows;
        None = as many as any boundaries need. Returns the output in float32 and what each stage's
        router decided, this first. `boundaries_BL` are for this stage alone.

        The stages inside have the packed rows as their rows.
        """
        outer_width = x_BLD.shape[-1]
        x_BLD = self.widen(x_BLD)
        if self.is_innermost:
            with jax.named_scope("main_network"):
                y_BLD = self.main_network(x_BLD, Context(segment_ids_BL))
                return y_BLD[..., :outer_width], []

        with jax.named_scope("encoder"):
            h_BLD = self.encoder(x_BLD, Context(segment_ids_BL))
        with jax.named_scope("residual_proj"):
            residual_BLD = self.residual(h_BLD)
        most = packed_rows * self.chunking.max_slots(x_BLD.shape[1])
        capacity = min(capacities[0] or most, most)
        noise = {"key": key, "temperature": temperature}
        with jax.named_scope("routing_module"):
            route = self.route(
                h_BLD, segment_ids_BL, capacity,
                route_ids_BL=route_ids_BL, boundaries_BL=boundaries_BL, packed_rows=packed_rows,
                **noise,
            )  # fmt: skip
        with jax.named_scope("chunk"):
            h_BLD, packed = pack_rows(h_BLD, route)
            chunks = self.chunk(h_BLD, packed, capacity)
        with jax.named_scope(f"stage{self.stage_idx + 1}"):
            y_BMD, inner = self.main_network(
                chunks.x_BMD, chunks.segment_ids_BM, capacities[1:],
                route_ids_BL=chunks.route_ids_BM, **noise,
            )  # fmt: skip
        with jax.named_scope("dechunk"):
            x_BLD = dechunk(y_BMD, chunks, packed, self.chunking.dechunk)
            x_BLD = x_BLD.reshape(residual_BLD.shape) + residual_BLD
        with jax.named_scope("decoder"):
            x_BLD = self.decoder(x_BLD, Context(segment_ids_BL))
            return x_BLD[..., :outer_width], [route, *inner]
