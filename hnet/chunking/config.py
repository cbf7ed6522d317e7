"""Configuration of chunking in one stage: parts, alignment of boundaries, rates and routes."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from hnet.bounds import Bounds, Natural
from hnet.chunking.boundaries import Alignment
from hnet.chunking.dechunks.ema import EMA
from hnet.chunking.losses.ratio import Ratio
from hnet.chunking.part import DechunkConfig, LossConfig, PoolConfig, PredictorConfig
from hnet.chunking.pools.select import Select
from hnet.chunking.predictors.cosine import Cosine
from hnet.chunking.table import DECHUNKS, LOSSES, POOLS, PREDICTORS
from hnet.errors import shown
from hnet.parts import Settings, settings_of

_MOST_RATIO = 10**6


@dataclass(frozen=True)
class ChunkingConfig:
    """How one stage chunks its positions (unused in the innermost stage). Defaults: official H-Net.

    A boundary at t is known from positions <= t. Alignment says what it means:

    * start: a chunk starts AT t, and the main network runs on its first position. Position t reads
      slot cumsum(b)_t - 1. The first position of a segment is always a boundary.
    * end: a chunk ENDS at t, and the main network runs on its last position. With null "learned"
      the slots of a segment are [null chunk, chunk 0, chunk 1, ...], and position t reads slot
      cumsum(b)_t, the last chunk that is complete. With null "first" there is no null chunk: the
      first position of a segment is a chunk of its own, and slots are counted as with start.

    A part may be given as its settings, its class or its name.
    """

    target_ratio: float = 6.0
    """N: target mean number of positions of this stage per chunk; stride of predictor "fixed\""""
    predictor: PredictorConfig = Cosine.Config()
    """boundary predictor"""
    alignment: Alignment = "start"
    """meaning of a boundary: it starts a chunk, or it ends one"""
    null: Literal["learned", "first"] = "learned"
    """vector that positions read before the first chunk of their document is complete (alignment
    end): a learned one, or that of the document's first position, which is then its own chunk"""
    pool: PoolConfig = Select.Config()
    """pool: computes a chunk's vector from the encoder states of its positions"""
    dechunk: DechunkConfig = EMA.Config()
    """dechunk: distributes the main network's output to positions"""
    residual: Literal["linear", "add", "none"] = "linear"
    """skip connection of the encoder states around the main network: a zero-initialised projection,
    the identity, or none"""
    encoder_scope: Literal["document", "chunk"] = "document"
    """past that an encoder position sees: its document, or only its chunk; chunk needs a predictor
    that does not read encoder states"""
    decoder_scope: Literal["document", "chunk"] = "document"
    """past that a decoder position sees: its document, or only positions that read the same
    chunk"""
    max_chunk_len: Natural = 0
    """maximum number of positions per chunk: a boundary is forced at this distance from the last
    one; 0 = no limit"""
    at_characters: bool = False
    """whether no chunk boundary divides a UTF-8 character: with start, only bytes that begin one
    can be boundaries; with end, only bytes that complete one, as its first byte announces. The
    chunks of inner stages then consist of whole characters too. Boundaries that max_chunk_len
    forces are exempt"""
    inner_positions: Literal["chunks", "original"] = "chunks"
    """rotary positions in the main network: indices of chunks, or the positions of this stage on
    which it runs"""
    losses: tuple[LossConfig, ...] = (Ratio.Config(),)
    """losses of this stage in addition to cross-entropy, each with its weight"""
    overflow: Literal["train", "ignore"] = "train"
    """cross-entropy of what follows the first boundary of a row that the capacity clipped: trained
    like the rest, or left out (stage 0 only)"""
    hold_rate: bool = False
    """rate control in training: hold the boundary rate of each route at 1/N with an offset on the
    logit of p that is part of the model (`hnet.chunking.rate_control`)"""

    routes: Annotated[int, Bounds(1, 4096)] = 1
    """number of routes (script groups) of this stage"""
    routed_parameters: bool = True
    """one predictor per route; False: one predictor for all, but targets and statistics per
    route"""
    route_target_ratios: tuple[float, ...] = ()
    """N per route; empty = target_ratio for all"""

    def __post_init__(self):
        for field, table in (("predictor", PREDICTORS), ("pool", POOLS), ("dechunk", DECHUNKS)):
            object.__setattr__(self, field, settings_of(getattr(self, field), table))
        losses = tuple(settings_of(loss, LOSSES) for loss in self.losses)
        object.__setattr__(self, "losses", losses)

    @property
    def parts(self) -> dict[str, Settings]:
        """Settings of all parts: dotted field -> settings."""
        losses = {f"losses.{i}": loss for i, loss in enumerate(self.losses)}
        named = {name: getattr(self, name) for name in ("predictor", "pool", "dechunk")}
        return named | losses

    @property
    def is_official(self) -> bool:
        """Whether the official model computes the same function. Losses may differ."""
        return not self.unofficial_fields

    @property
    def unofficial_fields(self) -> dict[str, tuple[Any, Any]]:
        """Fields that change the function: name -> (value here, value of the official model)."""
        fields = (
            "predictor", "alignment", "max_chunk_len", "at_characters", "pool", "dechunk",
            "residual", "encoder_scope", "decoder_scope", "inner_positions", "num_predictors",
            "hold_rate",
        )  # fmt: skip
        pairs = {f: (getattr(self, f), getattr(ChunkingConfig(), f)) for f in fields}
        return {f: (_plain(a), _plain(b)) for f, (a, b) in pairs.items() if a != b}

    @property
    def has_null_chunk(self) -> bool:
        """Whether a segment's first slot is a learned null chunk, without positions of its own."""
        return self.alignment == "end" and self.null == "learned"

    @property
    def reads_bytes(self) -> bool:
        """Whether the predictor reads bytes, or gets its boundaries per byte."""
        return self.predictor.part.reads_bytes

    @property
    def needs_bytes(self) -> bool:
        """Whether the bytes must be given with the states."""
        return self.reads_bytes or self.at_characters

    @property
    def num_predictors(self) -> int:
        """Number of predictors with their own parameters; several are stacked on a leading axis."""
        return self.routes if self.routed_parameters else 1

    @property
    def target_ratios(self) -> tuple[float, ...]:
        """N of each route."""
        return self.route_target_ratios or (self.target_ratio,) * self.routes

    @property
    def slots_per_chunk(self) -> int:
        """k: positions of the main network per chunk."""
        return self.pool.part.num_slots(self.pool)

    @property
    def loss_by_row(self) -> str | None:
        """Name of a loss that averages over the rates of single rows, if there is one."""
        return next((loss.name for loss in self.losses if loss.part.is_by_row), None)

    def max_slots(self, length: int) -> int:
        """Number of slots with which no boundary of a row of `length` positions is clipped.

        A null chunk adds one slot per segment, so a row whose segments have one position each needs
        two slots per position.
        """
        return length * (2 if self.has_null_chunk else 1)

    def first_slots(self, length: int) -> float:
        """Number of slots of a row of `length` positions in a run's first updates.

        All, for a learned predictor may pass through every rate; less for a rule, whose slots grow
        after the first update if its text has more boundaries.
        """
        rate = self.predictor.part.most_at_first / min(self.target_ratios)
        return min(self.max_slots(length), rate * length)

    def without_numbers(self) -> "ChunkingConfig":
        """The part that a compiled program depends on: numbers that are its inputs are reset."""
        target = {}
        if not self.predictor.part.target_is_static:
            target = {"target_ratio": ChunkingConfig.target_ratio, "route_target_ratios": ()}
        return replace(
            self,
            predictor=self.predictor.without_numbers(),
            pool=self.pool.without_numbers(),
            dechunk=self.dechunk.without_numbers(),
            losses=tuple(loss.without_numbers() for loss in self.losses),
            **target,
        )

    def problem(self, *, stage_idx: int, route_groups: int) -> str | None:
        """One line, "field=value: remedy", for settings that cannot work; None if they can.

        route_groups: number of script groups in the model's configuration (0 = not configured).
        """
        return (
            self._part_problem(stage_idx)
            or self._number_problem(route_groups)
            or next((f"{at}.{p}" for at, part in self.parts.items() if (p := part.problem())), None)
            or next((p for part in self.parts.values() if (p := part.problem_in(self))), None)
        )

    def _part_problem(self, stage_idx: int) -> str | None:
        predictor, pool = self.predictor.part, self.pool.part
        if self.alignment not in pool.alignments:
            why = "gives the vectors of the chunk before"
            if self.alignment == "start":
                why = "shows a chunk its own future"
            return (
                f"pool={self.pool.name!r} with alignment={self.alignment!r} {why}: use alignment="
                f"{pool.alignments[0]!r}, or pool='select'"
            )
        if self.alignment not in predictor.alignments:
            return (
                f"predictor={self.predictor.name!r} with alignment={self.alignment!r}: its "
                "boundary lies before the position that shows it, so it starts a chunk: use "
                "alignment='start', or predictor='mlp'"
            )
        if predictor.reads_bytes and stage_idx:
            return (
                f"predictor={self.predictor.name!r} in stage {stage_idx}, whose positions are "
                "chunks, not bytes: use it in stage 0, or predictor='fixed' here"
            )
        if self.slots_per_chunk > 1 and not self.dechunk.part.reads_all_vectors:
            return (
                f"dechunk={self.dechunk.name!r} reads one vector per chunk, and pool="
                f"{self.pool.name!r} gives {self.slots_per_chunk}: use 'indexed' or "
                "'cross_attention'"
            )
        if predictor.reads_levels and not stage_idx:
            return (
                f"predictor={self.predictor.name!r} in stage 0, which has no stage around it that "
                "gives levels: use it in an inner stage, or predictor='words' here"
            )
        if self.at_characters and stage_idx:
            return (
                f"at_characters=True in stage {stage_idx}, whose positions are chunks: set it in "
                "stage 0, so that all chunks consist of whole characters"
            )
        if self.encoder_scope == "chunk" and predictor.reads_states:
            return (
                f"encoder_scope='chunk' with predictor={self.predictor.name!r}, which reads the "
                "encoder's states: use encoder_scope='document', or a rule such as 'fixed'"
            )
        labels = next((loss.name for loss in self.losses if loss.part.trains_labels), None)
        if labels and not predictor.is_learned:
            return (
                f"losses={labels!r} has nothing to train in predictor={self.predictor.name!r}: "
                "leave it out"
            )
        if labels and stage_idx:
            return (
                f"losses={labels!r} in stage {stage_idx}: labels are for bytes, use it in stage 0"
            )
        nats = next((loss.name for loss in self.losses if loss.part.reads_next_byte), None)
        if nats and stage_idx:
            return (
                f"losses={nats!r} in stage {stage_idx}: it reads the cross-entropy of bytes, use "
                "it in stage 0"
            )
        if self.overflow == "ignore" and stage_idx:
            return (
                f"overflow='ignore' in stage {stage_idx}: cross-entropy is of bytes, use it in "
                "stage 0"
            )
        if self.hold_rate and (labels or not predictor.takes_offset):
            return (
                f"hold_rate=True with predictor={self.predictor.name!r} and losses="
                f"{[loss.name for loss in self.losses]}: rules and labels set the rate themselves, "
                "set it to False"
            )
        return None

    def _number_problem(self, route_groups: int) -> str | None:
        if max(self.target_ratios) > _MOST_RATIO:
            return f"target_ratio={max(self.target_ratios)}: use at most {_MOST_RATIO:,}"
        if min(self.target_ratios) <= 1:
            name = "route_target_ratios" if self.route_target_ratios else "target_ratio"
            return f"{name}={shown(getattr(self, name))}: use more than 1 position per chunk"
        if self.route_target_ratios and len(self.route_target_ratios) != self.routes:
            return (
                f"route_target_ratios={shown(self.route_target_ratios)} has "
                f"{len(self.route_target_ratios)} numbers for routes={self.routes}: give one each"
            )
        if route_groups and self.routes not in (1, route_groups + 1):
            return (
                f"routes={self.routes}, but model.route_groups names {route_groups} groups and a "
                f"default: use {route_groups + 1}, or 1"
            )
        return None


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Settings) else value
