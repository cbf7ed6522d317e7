"""How one stage chunks: its parts, what a boundary means, rates and routes."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from hnet.chunking.boundaries import Alignment
from hnet.chunking.dechunks.ema import EMA
from hnet.chunking.losses.ratio import Ratio
from hnet.chunking.part import DechunkConfig, LossConfig, PoolConfig, PredictorConfig
from hnet.chunking.pools.select import Select
from hnet.chunking.predictors.cosine import Cosine
from hnet.chunking.table import DECHUNKS, LOSSES, POOLS, PREDICTORS
from hnet.fields import Count
from hnet.parts import Part, Settings, Table


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

    A part may be given as its settings, as its class, or by its name.
    """

    target_ratio: float = 6.0
    """N: mean number of positions of this stage per chunk; the stride of predictor "fixed\""""
    predictor: PredictorConfig = Cosine.Config()
    """boundary predictor"""
    alignment: Alignment = "start"
    """whether a boundary starts a chunk or ends one"""
    null: Literal["learned", "first"] = "learned"
    """alignment end: what positions read before the first chunk of their document is complete: a
    learned vector, or the document's first position, which is then a chunk of its own"""
    pool: PoolConfig = Select.Config()
    """what makes a chunk's vector from the states of its positions"""
    dechunk: DechunkConfig = EMA.Config()
    """what gives positions the main network's output"""
    residual: Literal["linear", "add", "none"] = "linear"
    """how encoder states pass by the main network: zero-initialised projection, as they are, or
    not at all"""
    encoder_scope: Literal["document", "chunk"] = "document"
    """what an encoder position sees of the past: its document, or only its chunk; chunk needs a
    predictor that does not read encoder states"""
    decoder_scope: Literal["document", "chunk"] = "document"
    """what a decoder position sees of the past: its document, or only positions that read the same
    chunk"""
    losses: tuple[LossConfig, ...] = (Ratio.Config(),)
    """losses of this stage beside cross-entropy, each with its weight"""
    hold_rate: bool = False
    """hold the rate of each route at 1/N while training, by an offset on the logit of p that is
    part of the model (`hnet.chunking.controller`)"""

    routes: Count = 1
    """number of routes (script groups) that this stage tells apart"""
    routed_parameters: bool = True
    """a predictor for each route; False: one predictor, targets and statistics for each route"""
    route_target_ratios: tuple[float, ...] = ()
    """N of each route; empty = target_ratio for all"""

    def __post_init__(self):
        for field, table in (("predictor", PREDICTORS), ("pool", POOLS), ("dechunk", DECHUNKS)):
            object.__setattr__(self, field, settings_of(getattr(self, field), table))
        losses = tuple(settings_of(loss, LOSSES) for loss in self.losses)
        object.__setattr__(self, "losses", losses)

    @property
    def parts(self) -> dict[str, Settings]:
        """The settings of all parts by their dotted field."""
        losses = {f"losses.{i}": loss for i, loss in enumerate(self.losses)}
        named = {name: getattr(self, name) for name in ("predictor", "pool", "dechunk")}
        return named | losses

    @property
    def is_official(self) -> bool:
        """Whether the official model computes the same function; losses are another matter."""
        return not self.unofficial_fields

    @property
    def unofficial_fields(self) -> dict[str, tuple[Any, Any]]:
        """Fields that change the function: name -> (value here, value of the official model)."""
        fields = ("predictor", "alignment", "pool", "dechunk", "residual", "encoder_scope",
                  "decoder_scope", "num_predictors", "hold_rate")  # fmt: skip
        pairs = {f: (getattr(self, f), getattr(ChunkingConfig(), f)) for f in fields}
        return {f: (_plain(a), _plain(b)) for f, (a, b) in pairs.items() if a != b}

    @property
    def has_null(self) -> bool:
        """Whether a segment's first slot is a learned one that no position feeds."""
        return self.alignment == "end" and self.null == "learned"

    @property
    def reads_bytes(self) -> bool:
        """Whether the boundaries are a function of the bytes, or handed in for bytes."""
        return self.predictor.part.reads_bytes

    @property
    def num_predictors(self) -> int:
        """Predictors with parameters of their own; several are stacked along a leading axis."""
        return self.routes if self.routed_parameters else 1

    @property
    def target_ratios(self) -> tuple[float, ...]:
        """N of each route."""
        return self.route_target_ratios or (self.target_ratio,) * self.routes

    @property
    def slots_per_chunk(self) -> int:
        """k: positions of the main network per chunk."""
        return self.pool.part.slots_per_chunk

    @property
    def loss_by_row(self) -> str | None:
        """Name of a loss that is a mean over rows of their own rates, if there is one."""
        return next((loss.name for loss in self.losses if loss.part.is_by_row), None)

    def max_slots(self, length: int) -> int:
        """Slots that hold every set of boundaries of a row of `length` positions.

        With a null chunk each segment has a slot beside those of its boundaries, so a row of
        segments of one position needs two per position.
        """
        return length * (2 if self.has_null else 1)

    def without_numbers(self) -> "ChunkingConfig":
        """What a compiled program depends on: without the numbers that it takes as inputs."""
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
        """One line, "field=value: remedy", on what cannot work, or None.

        route_groups: groups of scripts that the model names (0 = none named).
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
            return (
                f"pool={self.pool.name!r} with alignment={self.alignment!r} shows a chunk its own "
                "future: use alignment='end', or pool='select'"
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
        if self.hold_rate and (labels or not predictor.is_learned):
            return (
                f"hold_rate=True with predictor={self.predictor.name!r} and losses="
                f"{[loss.name for loss in self.losses]}: rules and labels set the rate themselves, "
                "set it to False"
            )
        return None

    def _number_problem(self, route_groups: int) -> str | None:
        if min(self.target_ratios) <= 1:
            name = "route_target_ratios" if self.route_target_ratios else "target_ratio"
            return f"{name}={getattr(self, name)}: use more than 1 position per chunk"
        if self.route_target_ratios and len(self.route_target_ratios) != self.routes:
            return (
                f"route_target_ratios={self.route_target_ratios} has "
                f"{len(self.route_target_ratios)} numbers for routes={self.routes}: give one each"
            )
        if route_groups and self.routes not in (1, route_groups + 1):
            return (
                f"routes={self.routes}, but model.route_groups names {route_groups} groups and a "
                f"default: use {route_groups + 1}, or 1"
            )
        return None


def settings_of(part: Any, table: Table) -> Settings:
    """The settings of a part that is given as them, as its class, or by its name."""
    if isinstance(part, Settings):
        return part
    if isinstance(part, str):
        part = table.find(part)
    if isinstance(part, type) and issubclass(part, Part):
        return part.Config()
    raise TypeError(f"{table.kind} {part!r}: give its settings, its class or its name")


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Settings) else value
