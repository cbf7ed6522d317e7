"""A state of the chunk, projected to the width of the next inner stage (AU-Net, BLT)."""

from dataclasses import dataclass
from typing import Literal

from hnet.chunking.part import Pool, PoolConfig
from hnet.chunking.pools.extreme import Max, Min
from hnet.chunking.pools.mean import Mean
from hnet.chunking.pools.select import Select
from hnet.nn.layers import RMSNorm, linear


class Linear(Pool):
    """W norm(h), h: the state at the boundary (arXiv 2506.14761), or mean, maximum or minimum.

    BLT's pools without cross-attention have no norm (facebookresearch/blt).
    """

    alignments = ("start", "end")

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """State at the boundary, or mean, projected to the inner width (AU-Net, BLT)."""

        over: Literal["boundary", "chunk", "max", "min"] = "boundary"
        """state that is projected: that at the boundary, or the mean ("chunk"), largest or smallest
        value over the chunk"""
        norm: bool = True
        """RMSNorm before the projection"""

        def problem_in(self, chunking):
            if self.over != "boundary" and chunking.alignment == "start":
                return (
                    f"pool.over={self.over!r} with alignment='start' shows a chunk its own future: "
                    "use alignment='end', or pool.over='boundary'"
                )
            return None

    def __init__(self, config, place, *, rngs):
        super().__init__(config, place, rngs=rngs)
        D, E = place.d_model, place.d_inner
        self.norm = RMSNorm(D) if config.norm else None
        self.proj = linear(D, E, "embed out", dtype=place.dtype, rngs=rngs)
        base = {"boundary": Select, "chunk": Mean, "max": Max, "min": Min}[config.over]
        self.base = base(base.Config(), place, rngs=rngs)

    @classmethod
    def d_out(cls, config, place):
        return place.d_inner

    def project(self, h_BMD):
        if self.norm is not None:
            h_BMD = self.norm(h_BMD)
        return self.proj(h_BMD).astype("float32")

    def init(self, rows, d_model):
        return self.base.init(rows, d_model)

    def step(self, state, x):
        state, h_RD = self.base.step(state, x)
        return state, self.project(h_RD[:, None])[:, 0]

    def __call__(self, rows, boundaries, slots):
        return self.project(self.base(rows, boundaries, slots))

    def after(self, rows, boundaries):
        return self.base.after(rows, boundaries)
