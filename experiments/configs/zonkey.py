"""Zonkey's chunking at the size of the default job.

python -m experiments.pretrain zonkey --data.files english.txt
"""

from experiments.configs.systems import hnet, with_chunking
from hnet.chunking.losses.hazard import Hazard as HazardLoss
from hnet.chunking.losses.ratio import Ratio
from hnet.chunking.predictors.convolved import Hazard
from hnet.config import HNetConfig


def zonkey() -> HNetConfig:
    """Zonkey's splitter: a hazard of new chunks, weights by existence, at most 27 positions.

    Paper: arXiv 2601.21768
    Fidelity: hazard with its initial rate, drawn starts, and the losses for long and short chunks
    of ARozental/Zonkey; windows that overlap, its diffusion or flow over latents and the stitching
    are left out, convolutions are causal, and existence weights run backwards from a boundary
    Test: tests/chunking/systems/test_zonkey_rl_sombrero.py: probabilities of long and of short
    chunks, gradients
    """
    return with_chunking(
        hnet(), predictor=Hazard.Config(longest=27), pool="existence", dechunk="repeat",
        max_chunk_len=27, losses=(Ratio.Config(), HazardLoss.Config(weight=0.01)),
    )  # fmt: skip
