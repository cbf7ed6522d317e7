"""The jitted pieces of generation: start from prompts, then run blocks of steps on the device."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.config import EOS_ID, ConfigError
from hnet.data.scripts import route_table, script_ids, script_step
from hnet.infer import stream, utf8
from hnet.infer.prompts import length_bucket, pad
from hnet.infer.sampling import Controls, Sampling, sample
from hnet.model import HNetLM, split


class Decoding(NamedTuple):
    """A batch between two bytes."""

    cache: stream.ModelCache
    logits_BV: jax.Array
    recent_BW: jax.Array
    """the last bytes, for the repetition penalty; -1 before the start"""
    utf8_state_B: jax.Array
    script_state_B: jax.Array
    """of `hnet.data.scripts`: what decides a byte's route"""
    active_B: jax.Array


class Outputs(NamedTuple):
    """What T steps gave."""

    byte_TB: jax.Array
    logprob_TB: jax.Array
    boundaries_TBS: jax.Array


@partial(jax.jit, static_argnames=("graph", "max_lens"))
def _prefill(params, input_ids_BL, lengths_B, route_ids_BL, *, graph, max_lens):
    logits_BV, routes, cache = stream.prefill(
        nnx.merge(graph, params), input_ids_BL, lengths_B, max_lens, route_ids_BL=route_ids_BL
    )
    return logits_BV, [route.boundary_mask_BL for route in routes], cache


@partial(jax.jit, static_argnames=("graph", "num_steps"), donate_argnames="state")
def _steps(params, state, controls, seed_B, count, route_of, *, graph, num_steps):
    model = nnx.merge(graph, params)

    def one(state: Decoding, i):
        byte_B, logprob_B = sample(
            state.logits_BV, controls, seed_B, count + i, state.recent_BW, state.utf8_state_B
        )
        active_B = state.active_B & (byte_B != EOS_ID)
        script_state_B, script_B = script_step(state.script_state_B, byte_B)
        logits_BV, boundaries, cache = stream.step(
            model, state.cache, byte_B, active_B, route_ids_B=route_of[script_B]
        )
        recent_BW = jnp.concatenate([state.recent_BW[:, 1:], byte_B[:, None]], axis=1)
        utf8_state_B = utf8.advance(state.utf8_state_B, byte_B)
        state = Decoding(cache, logits_BV, recent_BW, utf8_state_B, script_state_B, active_B)
        return state, Outputs(byte_B, logprob_B, boundaries.mask_BS)

    return jax.lax.scan(one, state, jnp.arange(num_steps, dtype=jnp.int32))


class Decoder:
    """A model and its compiled programs; one for each shape of batch, prompt and room."""

    def __init__(self, model: HNetLM):
        """Raises ConfigError for a model that cannot continue a text."""
        self.config = model.config
        if model.config.num_chunked and model.config.stages[0].chunking.router == "given":
            raise ConfigError(
                "model.stages.0.chunking.router='given' cuts where it is told, which nobody can "
                "for a text that is yet to come: use a model with another router"
            )
        self.graph, self.params = split(model)
        self.route_of = route_table(model.config.route_groups, "model.route_groups")

    def start(self, prompts: Sequence[bytes], sampling: Sampling) -> tuple[Decoding, np.ndarray]:
        """(state after the prompts, boundaries bool (B, L, stages that cut)); a row a prompt."""
        ids_BL, lengths_B = pad(prompts)
        script_BL, script_state_B = np.zeros_like(ids_BL), np.zeros(len(prompts), np.uint32)
        for row, prompt in enumerate(prompts):
            script_BL[row, : len(prompt)], script_state_B[row] = script_ids(prompt)
        room = length_bucket(ids_BL.shape[1] + sampling.max_bytes)
        logits_BV, masks, cache = _prefill(
            self.params, ids_BL, lengths_B, self.route_of[script_BL],
            graph=self.graph, max_lens=stream.full_lens(self.config, room),
        )  # fmt: skip
        W = sampling.repetition_window
        recent_BW = np.full((len(prompts), W), -1, np.int32)
        for row, prompt in enumerate(prompts):
            recent_BW[row, max(0, W - len(prompt)) :] = list(prompt[-W:])
        utf8_state_B = np.array([utf8.state_after(prompt) for prompt in prompts], np.int32)
        rest = (recent_BW, utf8_state_B, script_state_B, np.ones(len(prompts), bool))
        state = Decoding(cache, logits_BV, *map(jnp.asarray, rest))
        return state, stream.byte_boundaries(self.config, jax.device_get(masks), ids_BL.shape)

    def run(
        self, state: Decoding, controls: Controls, seed_B: jax.Array, count: int, num_steps: int
    ) -> tuple[Decoding, Outputs]:
        """`num_steps` more bytes of every row, the first being its `count`-th; donates `state`."""
        return _steps(
            self.params, state, controls, seed_B, jnp.int32(count), jnp.asarray(self.route_of),
            graph=self.graph, num_steps=num_steps,
        )  # fmt: skip
