"""Boundaries from the entropy of a second model's next byte (BLT, arXiv 2412.09871)."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.boundaries import Prediction
from hnet.chunking.part import BoundaryPredictor, PredictorConfig
from hnet.config import HNetConfig, SSMConfig, StageConfig
from hnet.errors import ConfigError, shown
from hnet.layout import parse_layout
from hnet.model import HNetLM, split
from hnet.nn.cache import Rows
from hnet.nn.context import Context, StepContext
from hnet.nn.kernels.table import without
from hnet.nn.layers import segment_positions
from hnet.nn.parameters import set_frozen
from hnet.second_model.run import is_run, read_network, read_parameters, reads_bos

FORCED = 1e4  # logit of a boundary that the rule always has; -FORCED of one that it never has
UNTRAINED = HNetConfig((StageConfig(("m1",), 8),), ssm=SSMConfig(d_state=4, head_dim=8))
"""network of a second model that is not named yet, with random weights"""


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats of the distribution of each position, (..., V) -> (...)."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def end_logit(
    entropy_X: jax.Array, before_X: jax.Array, index_X: jax.Array, config: Any
) -> jax.Array:
    """How far the rule of `config` is exceeded at each position, in nats; above 0 a patch ends.

    entropy_X, before_X: entropy of the byte after the position, and of the byte at it. index_X:
    index in the document. As in facebookresearch/blt, the first position is a patch of its own,
    and with the rules monotonic and both so is the second; with both the third ends none.
    """
    rise_X = entropy_X - before_X - config.increase
    match config.rule:
        case "global":
            found_X = entropy_X - config.theta
        case "monotonic":
            found_X = jnp.where(index_X == 1, FORCED, rise_X)
        case "both":
            both_X = jnp.minimum(rise_X, entropy_X - config.theta)
            found_X = jnp.where(index_X == 1, FORCED, jnp.where(index_X == 2, -FORCED, both_X))
        case other:
            raise ValueError(f"rule={other!r}: use global, monotonic or both")
    return jnp.where(index_X == 0, FORCED, found_X)


class Entropy(BoundaryPredictor):
    """A patch ends where a trained byte model is uncertain about the next byte (BLT).

    The second model is a run of ours. Its parameters are copied into this model when a run begins,
    are saved with it, and are frozen. The logit of p is the distance from
    the threshold in nats, so `hold_rate` moves the threshold.
    """

    reads_bytes = True
    reads_states = False
    is_learned = False
    takes_offset = True
    target_is_static = False

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """Entropy of the next byte under a second, trained model (BLT)."""

        traced = ("theta", "increase")

        checkpoint: str = ""
        """work directory of the second model, perhaps with a step (WORKDIR@STEP): a run of a plain
        stack of layers (one stage)"""
        rule: Literal["global", "monotonic", "both"] = "global"
        """patches end where the entropy exceeds theta, where it rises by more than increase, or
        where both holds"""
        theta: float = 1.3354
        """threshold on the entropy, in nats"""
        increase: float = 0.0
        """threshold on its increase from the byte before, in nats (rules monotonic and both)"""
        language_model: HNetConfig | None = None
        """network of the second model; None: that of the checkpoint"""

        def __post_init__(self):
            if self.language_model is None and is_run(self.checkpoint):
                object.__setattr__(self, "language_model", read_network(self.checkpoint))

        @property
        def network(self) -> HNetConfig:
            """Network of the second model, with array code."""
            found = self.language_model or UNTRAINED
            return replace(found, compute=without(found.compute))

        def problem(self):
            network, where = self.network, f"checkpoint={shown(self.checkpoint)}: its model"
            if len(network.stages) > 1:
                return f"{where} chunks: use a run of a plain stack (model.stages of length 1)"
            if network.vocab_size != 256:
                return f"{where} has vocab_size={network.vocab_size}: use one of bytes, 256"
            stage = network.stages[0]
            letters = {kind.lower() for kind, _ in parse_layout(stage.arch_layout[0])}
            if "x" in letters:
                return f"{where} has layers x, which read chunks: use one without"
            if "t" in letters and stage.window_size < 0:
                return (
                    f"{where} has attention to the whole document, so its stream has no bound: "
                    "train it with --model.stages.0.window_size 512 or the like"
                )
            return None

        def training_problem(self, data):
            if not is_run(self.checkpoint):
                return None
            theirs = reads_bos(self.checkpoint)
            if theirs == data.bos_eos:
                return None
            return (
                f"predictor.checkpoint={shown(self.checkpoint)} was trained with data.bos_eos="
                f"{theirs}, and this run has data.bos_eos={data.bos_eos}: use the same"
            )

        def read_files(self):
            if not is_run(self.checkpoint):
                raise ConfigError(
                    f"predictor.checkpoint={shown(self.checkpoint)} holds no run: train a byte "
                    "model there (python -m experiments.pretrain blt_bytes), or name another"
                )
            if _function(read_network(self.checkpoint)) != _function(self.network):
                raise ConfigError(
                    f"predictor.checkpoint={shown(self.checkpoint)} holds another network than "
                    "predictor.language_model: leave language_model out"
                )
            read_parameters(self.checkpoint, self.network)

    def __init__(self, config, place, *, rngs: nnx.Rngs):
        super().__init__(config, place, rngs=rngs)
        self.starts = place.chunking.alignment == "start"
        graph, params = split(HNetLM(config.network, rngs=rngs))
        if config.checkpoint:
            shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
            read = lambda: read_parameters(config.checkpoint, config.network)
            params = jax.pure_callback(read, shapes)
        self.language_model = nnx.merge(graph, params)
        set_frozen(self.language_model, lambda path: True)

    def init(self, rows):
        none = jnp.zeros((rows, 1), jnp.int32)
        return self._after(none, none, jnp.zeros((rows,), jnp.int32))

    def step(self, state, x):
        before_R, last_R, embedding, caches = state
        model, stack = self.language_model, self.language_model.backbone.main_network
        embedding, x_RD = model.embeddings.step(embedding, x.context.bytes_BL)
        everyone = Rows(jnp.arange(x.index_R.shape[0], dtype=jnp.int32), are_all=True)
        x_RD, caches = stack.step(x_RD, _by_layer(caches), everyone, StepContext(x.index_R))
        entropy_R = self._entropy(x_RD[:, None])[:, 0]
        logit_R = end_logit(entropy_R, before_R, x.index_R, x.config)
        state = (entropy_R, logit_R, embedding, _by_row(caches))
        return state, Prediction(self._at_starts(last_R, x.index_R) if self.starts else logit_R)

    def __call__(self, rows):
        context = Context(rows.context.segment_ids_BL)
        x_BLD = self.language_model.embeddings(rows.context.bytes_BL, context)
        entropy_BL = self._entropy(self.language_model.backbone.main_network(x_BLD, context))
        index_BL = segment_positions(context.segment_ids_BL)
        logit_BL = end_logit(entropy_BL, _earlier(entropy_BL), index_BL, rows.config)
        if not self.starts:
            return Prediction(logit_BL)
        return Prediction(self._at_starts(_earlier(logit_BL), index_BL))

    def after(self, rows):
        context = rows.context
        return self._after(context.bytes_BL, context.segment_ids_BL, rows.lengths_B, rows)

    def _after(self, byte_BL, segment_ids_BL, lengths_B, rows=None):
        """(entropy after the last byte, logit of its end, state of the model)."""
        model, context = self.language_model, Context(segment_ids_BL)
        max_len = max(model.config.stages[0].window_size, 0) + 1
        x_BLD = model.embeddings(byte_BL, context)
        x_BLD, caches = model.backbone.main_network.prefill(x_BLD, context, lengths_B, max_len)
        last_B = logit_B = jnp.zeros(lengths_B.shape, jnp.float32)
        if rows is not None:
            entropy_BL = self._entropy(x_BLD)
            last_B = rows.at_end(entropy_BL)
            index_BL = segment_positions(segment_ids_BL)
            logit_BL = end_logit(entropy_BL, _earlier(entropy_BL), index_BL, rows.config)
            logit_B = rows.at_end(logit_BL)
        return last_B, logit_B, model.embeddings.after(byte_BL, context), _by_row(caches)

    def _entropy(self, x_BLD):
        return jax.lax.stop_gradient(entropy(self.language_model.logits(x_BLD)))

    @staticmethod
    def _at_starts(logit_X, index_X):
        """Logits of chunk starts from the logits of a patch's end at the position before."""
        return jnp.where(index_X == 0, FORCED, logit_X)


def _earlier(a_BL: jax.Array) -> jax.Array:
    return jnp.pad(a_BL[:, :-1], ((0, 0), (1, 0)))


def _by_row(caches: list) -> list:
    """Layer caches (layers, R, ...) as states of a part, (R, layers, ...)."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), caches)


def _by_layer(caches: list) -> list:
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), caches)


def _function(network: HNetConfig) -> HNetConfig:
    """The network without the settings of how it is computed."""
    return replace(network, compute=UNTRAINED.compute)
