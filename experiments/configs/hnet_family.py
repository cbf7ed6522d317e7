"""Variants of H-Net at the size of the default job.

    python -m experiments.pretrain sombrero --data.files english.txt

As in `experiments.configs.systems`, all share the layers of the default job, so that a comparison
shows only the effect of chunking. None of these papers has public code that was run here, except
where a docstring says so.
"""

from dataclasses import replace

from experiments.configs.systems import hnet, with_chunking
from hnet.chunking.losses.cab import CAB
from hnet.chunking.losses.ratio import Ratio
from hnet.config import HNetConfig, StageConfig


def hnet_3() -> HNetConfig:
    """H-Net with three stages, targets 3, 2 and 2.

    Paper: arXiv 2507.07955
    Fidelity: as hnet; the paper has one and two stages, and a third is made in the same way, with
    attention and Mamba-2 around the innermost network; the rates are held
    Test: tests/test_battery.py: a network of three stages
    """
    base = hnet()
    outer, main = base.stages
    first, second = (replace(outer.chunking, target_ratio=n) for n in (3.0, 2.0))
    middle = StageConfig(("m1", "m1"), 160, num_heads=4, rotary_emb_dim=20, chunking=second)
    inner = replace(middle, arch_layout=("T1", "T1"), d_model=192, d_intermediate=384)
    outer = replace(outer, chunking=first)
    return replace(base, stages=(outer, middle, inner, replace(main, arch_layout=("T3",))))


def sombrero() -> HNetConfig:
    """SOMBRERO: H-Net with smoothed states in front of the pool and boundaries at surprises.

    Paper: arXiv 2601.22805
    Fidelity: smoothing of the input by confidence, and the alignment loss with its weight .01, from
    the paper's description; it has no public code
    Test: tests/parts/test_parts.py, tests/parts/test_combinations.py
    """
    return with_chunking(hnet(), pool="smoothed", losses=(Ratio.Config(), CAB.Config()))


def hnet_multi_head() -> HNetConfig:
    """H-Net with a cosine router of several heads.

    Paper: lucidrains/h-net-dynamic-chunking
    Fidelity: heads vote on one sequence of chunks; in that code each head has its own, and the
    pool, gradients and start key differ from H-Net
    Test: tests/parts/test_parts.py, tests/parts/test_combinations.py
    """
    return with_chunking(hnet(), predictor="multi_cosine")


def hnet_attention_pool() -> HNetConfig:
    """H-Net whose chunks are pooled by attention of a learned query.

    Paper: lucidrains/h-net-dynamic-chunking
    Fidelity: a whole chunk can be read only at its end, so boundaries come from an MLP there; the
    query is a parameter and values are the states themselves
    Test: tests/parts/test_parts.py, tests/parts/test_combinations.py
    """
    return with_chunking(
        hnet(), predictor="mlp", alignment="end", pool="attention", losses=("binomial",)
    )


def dlcm() -> HNetConfig:
    """DLCM: mean pooling of chunks between dissimilar states, with a rate for the whole batch.

    Paper: arXiv 2512.24617
    Fidelity: over bytes, not BPE tokens; repeat in place of cross-attention; a chunk is read one
    position after its end, where the router sees the end; cross-entropy does not reach the router
    Test: tests/parts/test_parts.py, tests/parts/test_combinations.py
    """
    return with_chunking(hnet(), pool="mean_before", dechunk="repeat", residual="add")


def rl_tokenisation() -> HNetConfig:
    """RL tokenisation: boundaries drawn from a policy, whose reward is the nats that they save.

    Paper: arXiv 2602.13940
    Fidelity: reward, discount and weights of the paper; the policy does not read its last
    actions, returns are centred over a row, and evaluation puts boundaries where p > .5
    Test: tests/parts/test_parts.py, tests/parts/test_combinations.py,
    tests/chunking/systems/test_zonkey_rl_sombrero.py
    """
    return with_chunking(
        hnet(), target_ratio=5.0, predictor="policy", dechunk="repeat", residual="add",
        losses=("policy_gradient",),
    )  # fmt: skip
