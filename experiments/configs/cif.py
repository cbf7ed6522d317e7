"""Continuous integrate-and-fire at the size of the default job.

python -m experiments.pretrain cif --data.files english.txt
"""

from experiments.configs.systems import dtp_gumbel, with_chunking
from hnet.config import HNetConfig


def cif() -> HNetConfig:
    """CIF: weights are added up, and a chunk ends where they reach 1.

    Paper: arXiv 1905.11235
    Fidelity: predictor and integration as CifPredictor of modelscope/FunASR without right context;
    weights are not scaled to the target number in training, which is not causal, there is no tail,
    and the target number of chunks is a rate
    Test: tests/chunking/systems/test_cif.py: weights, fires, chunk vectors and their gradients
    """
    return with_chunking(
        dtp_gumbel(),
        target_ratio=6.0,
        predictor="cif",
        pool="integrate",
        losses=("quantity",),
        hold_rate=False,
    )
