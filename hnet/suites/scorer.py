"""What a suite asks of a model: scores of texts, greedy continuations, chunk boundaries."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from flax import nnx

from hnet.decode.generate import generate
from hnet.decode.sampling import Sampling
from hnet.decode.score import Score, logprobs
from hnet.decode.segment import segment_all, segmenter
from hnet.inspect.segmentation import Alignment, Segmentation
from hnet.model import HNetLM, abstract, split

GROUP = 8  # number of batches between two progress reports


class Scorer(Protocol):
    """Interface of a byte-level language model for suites; methods take any number of texts."""

    alignments: tuple[Alignment, ...]
    """alignment (whether a boundary starts or ends a chunk) per chunked stage, outermost first"""

    def score(self, texts: Sequence[bytes]) -> list[Score]:
        """Log-probability of each byte given those before it, and whether it is the most likely."""

    def greedy(self, prompts: Sequence[bytes], num_bytes: int) -> list[bytes]:
        """Greedy continuation of each prompt: at most `num_bytes`, up to a newline."""

    def boundaries(self, texts: Sequence[bytes]) -> list[Segmentation]:
        """Chunks of each text in every stage."""

    def in_bfloat16(self) -> "Scorer":
        """The same parameters with matmuls in bfloat16."""


class ModelScorer:
    """Scores with an `HNetLM`, `batch_size` texts at a time.

    progress: called with the numbers of texts (requested, done) whenever either grows.
    """

    def __init__(
        self,
        model: HNetLM,
        *,
        batch_size: int = 16,
        progress: Callable[[int, int], None] = lambda asked, done: None,
    ):
        self.model, self.batch_size, self.progress = model, batch_size, progress
        self.alignments = tuple(s.chunking.alignment for s in model.config.stages[:-1])
        graph, self._params = split(model)
        self._segment = segmenter(graph, model.config, bos=model.bos)

    def score(self, texts: Sequence[bytes]) -> list[Score]:
        return self._in_groups(
            lambda part: logprobs(self.model, part, batch_size=self.batch_size), texts
        )

    def greedy(self, prompts: Sequence[bytes], num_bytes: int) -> list[bytes]:
        sampling = Sampling(max_bytes=num_bytes, temperature=0.0, stop=("\n",))
        found = self._in_groups(
            lambda part: generate(self.model, part, sampling, batch_size=self.batch_size), prompts
        )
        return [each.data for each in found]

    def boundaries(self, texts: Sequence[bytes]) -> list[Segmentation]:
        return self._in_groups(lambda part: segment_all(self._segment, self._params, part), texts)

    def in_bfloat16(self) -> "ModelScorer":
        config = self.model.config
        graph, _ = abstract(replace(config, compute=replace(config.compute, dtype="bfloat16")))
        model = nnx.merge(graph, self._params)
        model.bos = self.model.bos
        return ModelScorer(model, batch_size=self.batch_size, progress=self.progress)

    def _in_groups(self, run: Callable, texts: Sequence[bytes]) -> list:
        """Apply `run` to batches of texts of similar length; results in the order of `texts`."""
        self.progress(len(texts), 0)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found, size = {}, GROUP * self.batch_size
        for first in range(0, len(order), size):
            members = order[first : first + size]
            spare = [b""] * (self.batch_size - len(members))  # pads to one shape
            found |= dict(zip(members, run([*(texts[i] for i in members), *spare])))
            self.progress(0, len(members))
        return [found[i] for i in range(len(texts))]


def bits_per_byte(scores: Sequence[Score]) -> float:
    """Bits per byte over all bytes that are predicted; NaN if there are none."""
    nats = [float(np.nansum(s.logprobs, dtype=np.float64)) for s in scores]
    count = sum(int(np.isfinite(s.logprobs).sum()) for s in scores)
    return -math.fsum(nats) / count / math.log(2) if count else math.nan
