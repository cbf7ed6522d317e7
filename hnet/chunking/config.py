"""How one stage cuts: router, alignment, pool, dechunk, residual, rate loss, routes."""

from dataclasses import dataclass
from typing import Literal

Alignment = Literal["start", "end"]


@dataclass(frozen=True)
class ChunkingConfig:
    """How one stage cuts its sequence (unused in the innermost stage). Defaults: official H-Net.

    A boundary at t is known from positions <= t. Alignment says what it means:

    * start: a chunk starts AT t, and the main network runs on its first position. Position t reads
      slot cumsum(b)_t - 1. The first position of a segment is always a boundary.
    * end: a chunk ENDS at t, and the main network runs on its last position. Slots of a segment are
      [null, chunk 0, chunk 1, ...]; position t reads slot cumsum(b)_t, which is the last chunk that
      is complete, so that the unfinished one is never read.
    """

    target_ratio: float = 6.0
    """N: positions of this stage a chunk should hold on average; the stride of the fixed router"""
    router: Literal["cosine", "mlp", "spacelike", "whitespace", "fixed", "given"] = "cosine"
    """cosine of neighbours; relaxed Bernoulli of an MLP; a rule of bytes; a stride; handed in"""
    alignment: Alignment = "start"
    """whether a boundary starts a chunk or ends one"""
    pool: Literal["select", "mean"] = "select"
    """the state at the boundary, or the mean over the chunk that ends there"""
    dechunk: Literal["ema", "repeat", "scatter"] = "ema"
    """smoothing with confidence; plain repeat; added at the boundary positions alone (SpaceByte)"""
    residual: Literal["linear", "add"] = "linear"
    """how encoder states pass the main network by: zero-initialised projection, or as they are"""
    aux_loss: Literal["ratio", "binomial", "hinge", "bce", "none"] = "ratio"
    """what holds the rate of boundaries"""
    aux_loss_weight: float = 0.03
    """alpha"""
    hold_rate: bool = False
    """hold the rate of each route at 1/N while training, by an offset on the logit of p that is
    part of the model (`hnet.chunking.controller`)"""

    sample: Literal["relaxed", "threshold"] = "relaxed"
    """mlp: straight-through relaxed Bernoulli, with noise where the model is given a key; or
    p > 0.5 without any gradient through b (predictors that are trained by labels)"""
    temperature: float = 0.5
    """mlp: of the relaxed Bernoulli"""
    mlp_width: int = 0
    """mlp: hidden width; 0 = 4 * d_model"""
    reference_noise_at_evaluation: bool = False
    """mlp: draw noise without a key too, as the dynamic-pooling code does (its paper rounds)"""

    hinge_band: float = 0.2
    """hinge: share of the rate 1/N by which it may fall below without a penalty"""
    labels: Literal["entropy", "given"] = "entropy"
    """bce: spikes of the model's own next-byte entropy, or labels handed to the loss"""
    reference_double_sigmoid: bool = False
    """bce: take the sigmoid of p itself, as the dynamic-pooling code does by mistake"""

    routes: int = 1
    """routes (groups of scripts) that this stage tells apart"""
    routed_parameters: bool = True
    """a router for each route; False: one router, targets and statistics for each route"""
    route_target_ratios: tuple[float, ...] = ()
    """N of each route; empty = target_ratio for all"""
    aux_average: Literal["positions", "routes"] = "positions"
    """weight of a route in the rate loss: by its positions, or equal for all that are present"""

    @property
    def is_official(self) -> bool:
        """Whether the official model computes the same function; losses are another matter."""
        fields = ("router", "alignment", "pool", "dechunk", "residual", "num_predictors",
                  "hold_rate")  # fmt: skip
        return all(getattr(self, f) == getattr(ChunkingConfig(), f) for f in fields)

    @property
    def has_null(self) -> bool:
        """Whether a segment's first slot is a learned one that no position feeds."""
        return self.alignment == "end"

    @property
    def reads_bytes(self) -> bool:
        """Whether the boundaries are a function of the bytes, or handed in for bytes."""
        return self.router in ("spacelike", "whitespace", "given")

    @property
    def aux_loss_is_by_row(self) -> bool:
        """Whether the rate loss is a mean over rows of their own rates."""
        return self.aux_loss in ("binomial", "hinge")

    @property
    def num_predictors(self) -> int:
        """Routers with parameters of their own, stacked along a leading axis if more than one."""
        return self.routes if self.routed_parameters else 1

    @property
    def target_ratios(self) -> tuple[float, ...]:
        """N of each route."""
        return self.route_target_ratios or (self.target_ratio,) * self.routes

    def max_slots(self, length: int) -> int:
        """Slots that hold every set of boundaries of a row of `length` positions.

        With alignment end each segment has a null slot beside those of its boundaries, so a row of
        segments of one position needs two a position.
        """
        return length * (2 if self.has_null else 1)

    def problem(self, *, stage_idx: int, route_groups: int) -> str | None:
        """One line, "field=value: remedy", on what cannot work, or None.

        route_groups: groups of scripts that the model names (0 = none named).
        """
        return self._pairing_problem(stage_idx) or self._number_problem(route_groups)

    def _pairing_problem(self, stage_idx: int) -> str | None:
        if self.pool == "mean" and self.alignment == "start":
            return (
                "pool='mean' with alignment='start' shows a chunk its own future: use "
                "alignment='end', or pool='select'"
            )
        if self.router == "cosine" and self.alignment == "end":
            return (
                "router='cosine' with alignment='end': its boundary lies before the position that "
                "shows it, so it starts a chunk: use alignment='start', or router='mlp'"
            )
        if self.reads_bytes and stage_idx:
            return (
                f"router={self.router!r} in stage {stage_idx}, whose positions are chunks, not "
                "bytes: use it in stage 0, or router='fixed' here"
            )
        if self.aux_loss == "bce" and self.router not in ("mlp", "cosine"):
            return f"aux_loss='bce' has nothing to train in router={self.router!r}: use 'none'"
        if self.hold_rate and (self.router not in ("mlp", "cosine") or self.aux_loss == "bce"):
            return (
                f"hold_rate=True with router={self.router!r} and aux_loss={self.aux_loss!r}: rules "
                "and labels say themselves how often they cut, set it to False"
            )
        if self.aux_loss == "bce" and stage_idx:
            return f"aux_loss='bce' in stage {stage_idx}: labels are for bytes, use it in stage 0"
        return None

    def _number_problem(self, route_groups: int) -> str | None:
        if min(self.target_ratios) <= 1:
            name = "route_target_ratios" if self.route_target_ratios else "target_ratio"
            return f"{name}={getattr(self, name)}: use more than 1 position a chunk"
        if self.router == "fixed" and self.target_ratio != int(self.target_ratio):
            stride = self.target_ratio
            return f"target_ratio={stride} is the stride of router='fixed': use a whole number"
        if not self.temperature > 0:
            return f"temperature={self.temperature}: use a number above 0"
        if self.mlp_width < 0:
            return f"mlp_width={self.mlp_width}: use 1 or more, or 0 for 4 * d_model"
        if not 0 <= self.hinge_band < 1:
            return f"hinge_band={self.hinge_band}: use a share from 0 to below 1"
        if self.aux_loss_weight < 0:
            return f"aux_loss_weight={self.aux_loss_weight}: use 0 or more"
        if self.routes < 1:
            return f"routes={self.routes}: use 1 or more"
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
