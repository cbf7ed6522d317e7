"""The jitted parts of generation: start from prompts, then run blocks of steps on the device."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hnet.config import EOS_ID
from hnet.data.scripts import route_table, script_ids, script_step
from hnet.decode import apart, cache_memory, stream, utf8
from hnet.decode.by_counts import Done, Fed, Static, forward
from hnet.decode.prompts import pad
from hnet.decode.sampling import Controls, Sampling, sample
from hnet.errors import ConfigError
from hnet.model import HNetLM, split

# Rows at a boundary wait until this share is at one. Waiting pays where reading the weights of the
# main network takes most of its time; both values were the fastest of those measured on a CPU.
WAIT_SHARE = 0.7
WAIT_SHARE_IN_CACHE = 0.3
MOST_TICKS = 64  # steps between two checks by the host that one compiled program can do
# A step has hundreds of small operations, most of which need the one before: XLA's default order
# of them lets a second thread run some, and the handover takes longer than they do.
STEP_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
CACHE_BYTES = 32 << 20  # weights of a main network that stay in a processor's cache


class Decoding(NamedTuple):
    """State of a batch; a row is between two bytes, or waits at a boundary with a partial byte."""

    cache: stream.ModelCache
    logits_BV: jax.Array
    recent_BW: jax.Array
    """most recent bytes, for the repetition penalty; -1 before the start"""
    utf8_state_B: jax.Array
    script_state_B: jax.Array
    """script state of `hnet.data.scripts`, which determines the route of a byte"""
    byte_B: jax.Array
    """byte that was drawn last; route_B and logprob_B are its route and log-probability"""
    route_B: jax.Array
    logprob_B: jax.Array
    count_B: jax.Array
    """number of bytes drawn so far"""
    done_B: jax.Array
    """whether the model has finished the last byte, so that another can be drawn"""
    running_B: jax.Array
    """whether the row still needs bytes"""


class Outputs(NamedTuple):
    """Outputs of T ticks; a row gets at most one byte per tick."""

    byte_TB: jax.Array
    logprob_TB: jax.Array
    boundaries_TBS: jax.Array
    given_TB: jax.Array
    """whether the row got a byte"""


def _first_state(done: Done, lengths_B: jax.Array, rest: tuple):
    """(state after the prompts, boundaries). rest: the other fields of the state, passed through
    so that they are where the parameters are: a block of steps would compile again otherwise."""
    ids_BL = done.fed.input_ids_BL
    after = (done.model, done.x_BLD, done.context, ids_BL, lengths_B, done.cache)
    logits_BV, cache = stream.after_prompts(*after)
    masks = [found.boundary_mask_BL for found in done.boundaries]
    return Decoding(cache, logits_BV, *rest), masks


@partial(jax.jit, static_argnames=("static", "max_lens"))
def _empty_cache(params, ids_B1, lengths_B, *, static, max_lens):
    model = static.merge(params)
    return stream.prefill(model, ids_B1, lengths_B, max_lens, route_ids_BL=ids_B1)[2]


@partial(
    jax.jit, static_argnames=("static", "most_ticks"), donate_argnames="state",
    compiler_options=STEP_OPTIONS,
)  # fmt: skip
def _run(params, state, controls, seed_B, route_of, wait_share, num_ticks, *, static, most_ticks):
    model = static.merge(params)

    def wants_B(state: Decoding):
        return state.running_B & (state.count_B < controls.max_bytes)

    def tick(state: Decoding) -> tuple[Decoding, Outputs]:
        drawn_B = wants_B(state) & state.done_B
        update = lambda on_B, new, old: jnp.where(
            on_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old
        )
        byte_B, logprob_B = sample(
            state.logits_BV, controls, seed_B, state.count_B, state.recent_BW, state.utf8_state_B
        )
        byte_B = update(drawn_B, byte_B, state.byte_B)
        logprob_B = update(drawn_B, logprob_B, state.logprob_B)
        ends_B = drawn_B & (byte_B == EOS_ID)
        active_B = drawn_B & ~ends_B
        script_state_B, script_B = script_step(state.script_state_B, byte_B)
        route_B = update(active_B, route_of[script_B], state.route_B)
        logits_BV, boundaries, done_B, cache = stream.advance(
            model, state.cache, byte_B, active_B, route_ids_B=route_B, wait_share=wait_share
        )
        recent_BW = jnp.concatenate([state.recent_BW[:, 1:], byte_B[:, None]], axis=1)
        new = Decoding(
            cache,
            update(done_B, logits_BV, state.logits_BV),
            update(active_B, recent_BW, state.recent_BW),
            update(active_B, utf8.advance(state.utf8_state_B, byte_B), state.utf8_state_B),
            update(active_B, script_state_B, state.script_state_B),
            byte_B,
            route_B,
            logprob_B,
            state.count_B + drawn_B.astype(jnp.int32),
            update(active_B, done_B, state.done_B | done_B),
            state.running_B & ~ends_B,
        )
        return new, Outputs(byte_B, logprob_B, boundaries.mask_BS, done_B | ends_B)

    def goes_on(carry):
        i, state, _ = carry
        return (i < num_ticks) & jnp.any(wants_B(state) | ~state.done_B)

    def collect(carry):
        i, state, outputs = carry
        state, new = tick(state)
        return i + 1, state, jax.tree.map(lambda all_T, one: all_T.at[i].set(one), outputs, new)

    shapes = jax.eval_shape(tick, state)[1]
    nothing = jax.tree.map(lambda a: jnp.zeros((most_ticks, *a.shape), a.dtype), shapes)
    return jax.lax.while_loop(goes_on, collect, (jnp.int32(0), state, nothing))[1:]


class Decoder:
    """A model and its compiled functions, one per shape of batch, prompt and cache."""

    def __init__(
        self, model: HNetLM, wait_share: float | None = None, layers_apart: bool | None = None
    ):
        """wait_share: see `hnet.decode.stream.advance`; with 0 no row waits; None: by the size of
        the main network. layers_apart: whether layers are apart (`hnet.decode.apart`);
        None: if that needs no copy of the weights. Raises ConfigError for a model that cannot
        continue a text."""
        self.config = model.config
        chunkings = [stage.chunking for stage in model.config.stages[:-1]]
        if chunkings and chunkings[0].predictor.name == "external":
            raise ConfigError(
                "model.stages.0.chunking.predictor='external' is told its boundaries, which are "
                "not known for a text that is yet to come: use a model with another predictor"
            )
        stream.check_streams(model.config)
        if layers_apart is None:
            layers_apart = apart.can_be_apart(split(model)[1])
        self.static, self.params = Static.of(apart.model_apart(model) if layers_apart else model)
        main = jax.tree.leaves(self.static.nested(self.params)["backbone"]["main_network"])
        by_size = WAIT_SHARE if sum(a.nbytes for a in main) > CACHE_BYTES else WAIT_SHARE_IN_CACHE
        self.wait_share = by_size if wait_share is None else wait_share
        self.route_of = route_table(model.config.route_groups, "model.route_groups")
        self._numbers = jnp.asarray(self.route_of), jnp.float32(self.wait_share)
        self.cache_bytes = lru_cache(self._cache_bytes)

    def start(self, prompts: Sequence[bytes], sampling: Sampling) -> tuple[Decoding, np.ndarray]:
        """(state after the prompts, boundaries bool (B, L, chunking stages)); one row per prompt.

        Raises ConfigError if a cache for `sampling.max_bytes` does not fit into memory.
        """
        ids_BL, lengths_B = pad(prompts)
        script_BL, script_state_B = np.zeros_like(ids_BL), np.zeros(len(prompts), np.uint32)
        for row, prompt in enumerate(prompts):
            script_BL[row, : len(prompt)], script_state_B[row] = script_ids(prompt)
        longest = cache_memory.positions(
            ids_BL.shape[1], sampling.max_bytes, len(prompts),
            partial(self.cache_bytes, len(prompts)),
        )  # fmt: skip
        segment_ids_BL = (np.arange(ids_BL.shape[1]) < lengths_B[:, None]).astype(np.int32)
        W = sampling.repetition_window
        recent_BW = np.full((len(prompts), W), -1, np.int32)
        for row, prompt in enumerate(prompts):
            recent_BW[row, max(0, W - len(prompt)) :] = list(prompt[-W:])
        utf8_state_B = np.array([utf8.state_after(prompt) for prompt in prompts], np.int32)
        B = len(prompts)
        rest = (
            recent_BW, utf8_state_B, script_state_B,
            np.zeros(B, np.int32), np.zeros(B, self.route_of.dtype), np.zeros(B, np.float32),
            np.zeros(B, np.int32), np.ones(B, bool), np.ones(B, bool),
        )  # fmt: skip
        state, masks = forward(
            self.static, self.params, Fed(ids_BL, segment_ids_BL, self.route_of[script_BL]),
            _first_state, lengths_B, rest, lengths_B=lengths_B,
            max_lens=stream.full_lens(self.config, longest),
        )  # fmt: skip
        return state, stream.boundaries_at_bytes(self.config, jax.device_get(masks), ids_BL.shape)

    def _cache_bytes(self, rows: int, num_bytes: int) -> int:
        """Size of a cache for rows of `num_bytes` bytes; nothing is allocated."""
        shape_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
        shape_B1 = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
        cache = _empty_cache.eval_shape(
            self.params, shape_B1, shape_B,
            static=self.static, max_lens=stream.full_lens(self.config, num_bytes),
        )  # fmt: skip
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    def run(
        self, state: Decoding, controls: Controls, seed_B: jax.Array, num_ticks: int
    ) -> tuple[Decoding, Outputs]:
        """Draw up to `num_ticks` more bytes for every row; donates `state`.

        A row that waits at a boundary gets fewer bytes, see `hnet.decode.stream.advance`. The
        outputs have at least `MOST_TICKS` ticks; no row gets a byte after the first `num_ticks`.
        """
        return _run(
            self.params, state, controls, seed_B, *self._numbers, np.int32(num_ticks),
            static=self.static, most_ticks=max(MOST_TICKS, num_ticks),
        )  # fmt: skip
