"""The official pool: a chunk is the encoder state at its boundary."""

from dataclasses import dataclass

from hnet.chunking.part import Pool, PoolConfig


class Select(Pool):
    """The encoder state at the boundary (arXiv 2507.07955, section 2.2.1)."""

    alignments = ("start", "end")

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """Encoder state at the boundary (H-Net, SpaceByte)."""

    def step(self, state, x):
        return state, x.h_RD

    def __call__(self, rows, boundaries, slots):
        return slots.gather(rows.h_BLD)
