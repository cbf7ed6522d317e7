"""The configuration of a network: a tuple of stages, outermost first.

Every stage but the last has an encoder, a boundary predictor that splits its sequence into chunks,
and a decoder; the last stage is a plain stack. `hnet.config` checks these settings.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from hnet.bounds import Count
from hnet.chunking.config import ChunkingConfig
from hnet.nn.embeddings import EMBEDDINGS
from hnet.nn.embeddings.bytes import Bytes
from hnet.nn.embeddings.part import EmbeddingConfig
from hnet.nn.settings import SharedConfig, StackConfig
from hnet.parts import settings_of


@dataclass(frozen=True)
class StageConfig(StackConfig):
    """One stage. Stage 0 is the outermost: its positions are bytes."""

    chunking: ChunkingConfig = ChunkingConfig()
    _: KW_ONLY
    passes: Count = 1
    """number of times that chunk vectors pass a main network and positions a decoder that reads
    them. Each further pass has parameters of its own: the vectors read the states of their chunk,
    pass a main network like the first, and are read by the next decoder"""


@dataclass(frozen=True)
class Architecture(SharedConfig):
    """The language model over bytes."""

    stages: tuple[StageConfig, ...]
    vocab_size: int = 256
    """number of embeddings, one per byte value; at least 256"""
    _: KW_ONLY
    tie_embeddings: bool = False
    """weight tying: the output head uses the embedding matrix"""
    embedding: EmbeddingConfig = Bytes.Config()
    """embedding: computes the vector of each byte from the bytes of its document up to it"""
    route_groups: tuple[tuple[str, ...], ...] = ()
    """names of Unicode scripts that share a route: group i is route i + 1, all others route 0"""

    def __post_init__(self):
        object.__setattr__(self, "embedding", settings_of(self.embedding, EMBEDDINGS))

    @property
    def num_chunked(self) -> int:
        """Number of stages that chunk, which is the number of boundary predictors."""
        return len(self.stages) - 1

    @property
    def num_routes(self) -> int:
        """Maximum number of routes of a stage; the model needs route ids if it is more than 1."""
        return max((s.chunking.routes for s in self.stages[:-1]), default=1)

    @property
    def route_names(self) -> tuple[str, ...]:
        """Name of each route: "default" for route 0, else the scripts of its group
        ("Han+Hiragana")."""
        groups = self.route_groups or [(str(r),) for r in range(1, self.num_routes)]
        return ("default", *("+".join(group) for group in groups))

    def numbers(self) -> tuple[dict[str, Any], ...]:
        """Numbers that a compiled program takes as inputs, float32, for each stage that chunks:
        `target_ratio_R`, and the traced numbers of each part."""
        found = []
        for chunking in (stage.chunking for stage in self.stages[:-1]):
            parts = {
                name: {field: np.float32(value) for field, value in settings.numbers().items()}
                for name, settings in chunking.parts.items()
            }
            losses = tuple(parts.pop(f"losses.{i}") for i in range(len(chunking.losses)))
            targets = np.asarray(chunking.target_ratios, np.float32)
            found.append({**parts, "losses": losses, "target_ratio_R": targets})
        return tuple(found)

    def read_files(self) -> None:
        """Read the files that initial parameters come from. Raises ConfigError."""
        chunkings = [stage.chunking for stage in self.stages[:-1]]
        parts = [part for chunking in chunkings for part in chunking.parts.values()]
        for part in (self.embedding, *parts):
            part.read_files()

    @property
    def arch_layout(self) -> list:
        """The nested official form, e.g. ``["m4", ["T22"], "m4"]``."""
        nested: list = list(self.stages[-1].arch_layout)
        for stage in reversed(self.stages[:-1]):
            nested = [stage.arch_layout[0], nested, stage.arch_layout[1]]
        return nested
