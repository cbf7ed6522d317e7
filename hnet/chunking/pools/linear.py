"""The pool of AU-Net: a state of the chunk, projected to the width of the next inner stage."""

from dataclasses import dataclass
from typing import Literal

from hnet.chunking.part import Pool, PoolConfig
from hnet.chunking.pools.mean import Mean
from hnet.chunking.pools.select import Select
from hnet.nn.layers import RMSNorm, linear


class Linear(Pool):
    """W norm(h), h: the state at the boundary or the mean over the chunk (arXiv 2506.14761)."""

    alignments = ("start", "end")

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """State at the boundary, or mean, projected to the inner width (AU-Net)."""

        over: Literal["boundary", "chunk"] = "boundary"
        """state that is projected: that at the boundary, or the mean over the chunk"""

        def problem_in(self, chunking):
            if self.over == "chunk" and chunking.alignment == "start":
                return (
                    "pool.over='chunk' with alignment='start' shows a chunk its own future: use "
                    "alignment='end', or pool.over='boundary'"
                )
            return None

    def __init__(self, config, place, *, rngs):
        super().__init__(config, place, rngs=rngs)
        D, E = place.d_model, place.d_inner
        self.norm = RMSNorm(D)
        self.proj = linear(D, E, "embed out", dtype=place.dtype, rngs=rngs)
        base = {"boundary": Select, "chunk": Mean}[config.over]
        self.base = base(base.Config(), place, rngs=rngs)

    @classmethod
    def d_out(cls, config, place):
        return place.d_inner

    def project(self, h_BMD):
        return self.proj(self.norm(h_BMD)).astype("float32")

    def init(self, rows, d_model):
        return self.base.init(rows, d_model)

    def step(self, state, x):
        state, h_RD = self.base.step(state, x)
        return state, self.project(h_RD[:, None])[:, 0]

    def __call__(self, rows, boundaries, slots):
        return self.project(self.base(rows, boundaries, slots))

    def after(self, rows, boundaries):
        return self.base.after(rows, boundaries)
