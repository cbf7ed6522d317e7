"""The cosine predictor with several heads."""

from dataclasses import dataclass

from flax import nnx

from hnet.bounds import Count
from hnet.chunking.part import PredictorConfig
from hnet.chunking.predictors.cosine import Cosine, half_cosine_distance


class MultiCosine(Cosine):
    """p_t = mean over heads of (1 - cos(q_{t-1}, k_t)) / 2, a head being a part of the channels.

    After lucidrains/h-net-dynamic-chunking, where every head cuts on its own; here they vote, so
    that there is one sequence of chunks. With one head it is `Cosine`.
    """

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """Cosine distance of neighbouring encoder states, averaged over heads."""

        heads: Count = 4
        """number of heads; channels that they do not divide evenly belong to the last"""

        def problem(self):
            return None if self.heads >= 1 else f"heads={self.heads}: use 1 or more"

    def __init__(self, config, place, *, rngs: nnx.Rngs):
        super().__init__(config, place, rngs=rngs)
        self.heads = min(config.heads, place.d_model)

    def score(self, previous_XD, h_XD):
        q_XD, k_XD = self.q_proj_layer(previous_XD), self.k_proj_layer(h_XD)
        width = q_XD.shape[-1] // self.heads
        starts = [head * width for head in range(self.heads)] + [q_XD.shape[-1]]
        total_X = sum(
            half_cosine_distance(q_XD[..., a:b], k_XD[..., a:b]) for a, b in zip(starts, starts[1:])
        )
        return total_X / self.heads
