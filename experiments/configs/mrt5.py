"""MrT5 (arXiv 2410.20771) on a decoder-only byte model: a gate deletes positions.

    python -m experiments.pretrain mrt5 --data.files 'books/*.txt'

About 8 minutes on two CPU cores: soft deletion gives every byte a slot of the main network, so
training costs as much as without deletion. Evaluation and sampling remove the deleted positions.
"""

from dataclasses import replace

from experiments.configs.systems import one_stage
from hnet.config import AttentionConfig, HNetConfig


def mrt5() -> HNetConfig:
    """MrT5, decoder-only: bytes that a gate deletes are invisible to the inner layers.

    Paper: arXiv 2410.20771
    Fidelity: gate, soft and hard deletion at original positions, softmax with a sink of 1 and the
    PI controller as in jkallini/mrt5; ours is causal and has a decoder for bytes that reads the
    last kept one; its entropy regularizer is the loss gate_entropy (off, as there by default), its
    score regularizer is left out; the first byte is always kept; the rate is held
    Test: tests/chunking/test_deletion.py: gate, softmax, controller, entropy;
    tests/chunking/systems/test_mrt5.py: these parts in its whole network
    """
    base = one_stage(6.0)
    outer, inner = base.stages
    chunking = replace(
        outer.chunking, target_ratio=2.0, predictor="deletion_gate", dechunk="repeat",
        residual="add", inner_positions="original", losses=("gate_mean",), hold_rate=True,
    )  # fmt: skip
    inner = replace(inner, attention=AttentionConfig(sink="one"))
    return replace(base, stages=(replace(outer, chunking=chunking), inner))
