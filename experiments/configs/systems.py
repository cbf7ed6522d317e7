"""The published chunking systems at one common small size, each by its name.

    python -m experiments.pretrain magnet --data.files eng.txt rus.txt hin.txt

They are trained like the default configuration, which takes about 5 minutes on two CPU cores. All
share the network of the default job (`m2` around a wider `T4`), with pre-norm blocks, rotary
positions, dense causal attention and no dropout, so that a comparison shows only the effect of
chunking. They reproduce the systems' boundaries, pools, dechunking, residuals and losses, but not
their blocks:

* SpaceByte has attention blocks with a narrow window around the global ones, learned positions, and
  widens states with zeros in front; ours widens them with a learned vector at the end.
* DTP, MAGNET and FlexiTokens have post-norm Transformer-XL blocks outside and inside; their
  relative attention is replaced by rotary, and the norm after their pooling by the norm before each
  block.

Script names and targets: MAGNET's shipped priors are .2, .1 and .08 for Latin, Cyrillic and the
Indic scripts; FlexiTokens scales English .333 by the bytes of parallel sentences.
"""

from dataclasses import replace

from experiments.configs import default
from hnet.chunking.losses.bce import BCE
from hnet.chunking.losses.binomial import Binomial
from hnet.chunking.losses.hinge import Hinge
from hnet.chunking.predictors.mlp import MLP
from hnet.config import HNetConfig

INDIC = ("Devanagari", "Bengali", "Telugu")


def with_chunking(base: HNetConfig, **fields) -> HNetConfig:
    """`base` with fields of its outermost stage's chunking replaced."""
    outer, *inner = base.stages
    outer = replace(outer, chunking=replace(outer.chunking, **fields))
    return replace(base, stages=(outer, *inner))


def hnet() -> HNetConfig:
    """H-Net with one stage, target 6 (arXiv 2507.07955)."""
    return with_chunking(default.config().model, target_ratio=6.0)


def hnet_space() -> HNetConfig:
    """H-Net(space): H-Net with boundaries at spaces; p is 0 or 1, so nothing is smoothed."""
    return with_chunking(hnet(), predictor="spacelike", dechunk="repeat", losses=())


def hnet_pool() -> HNetConfig:
    """H-Net(pool): a boundary every 6 bytes."""
    return with_chunking(hnet_space(), predictor="fixed")


def spacebyte() -> HNetConfig:
    """SpaceByte (arXiv 2404.14408): global states are added where a word begins, nowhere else."""
    return with_chunking(hnet_space(), dechunk="at_boundaries", residual="add")


def dtp_gumbel() -> HNetConfig:
    """Dynamic token pooling with a relaxed Bernoulli and a binomial prior of .2 (2211.09761)."""
    return with_chunking(
        hnet(), target_ratio=5.0, predictor="mlp", alignment="end", pool="mean", dechunk="repeat",
        residual="add", losses=("binomial",),
    )  # fmt: skip


def dtp_entropy() -> HNetConfig:
    """Dynamic token pooling with a predictor of the model's own entropy spikes.

    As in its code, the loss takes the sigmoid of p itself.
    """
    return with_chunking(
        dtp_gumbel(),
        predictor=MLP.Config(straight_through=False),
        losses=(BCE.Config(reference_double_sigmoid=True),),
    )


def dtp_unigram() -> HNetConfig:
    """Dynamic token pooling with a predictor of a tokenizer's cuts, which the batch brings.

    As in its code, the loss takes the sigmoid of p itself.
    """
    return with_chunking(
        dtp_entropy(), losses=(BCE.Config(labels="given", reference_double_sigmoid=True),)
    )


def dtp_whitespace() -> HNetConfig:
    """Dynamic token pooling with a boundary after every space."""
    return with_chunking(dtp_gumbel(), predictor="whitespace", losses=())


def dtp_fixed() -> HNetConfig:
    """Dynamic token pooling with a boundary every 4 bytes."""
    return with_chunking(dtp_whitespace(), predictor="fixed", target_ratio=4.0)


def magnet() -> HNetConfig:
    """MAGNET (arXiv 2407.08818): DTP with one predictor and one prior per script."""
    base = replace(dtp_gumbel(), route_groups=(("Latin",), ("Cyrillic",), INDIC))
    ratios = (5.0, 5.0, 10.0, 12.5)  # the first is for all other scripts
    return with_chunking(
        base, routes=4, route_target_ratios=ratios, losses=(Binomial.Config(average="routes"),)
    )


def flexitokens() -> HNetConfig:
    """FlexiTokens (arXiv 2507.12720): one predictor, a hinge with an upper rate for each script."""
    rates = (0.333, 0.333, 0.17, 0.127)  # of English, Russian and Ukrainian, Hindi and Telugu
    sigmas = (0.023, 0.023, 0.0115, 0.0085)  # of the shipped rates: the band is 3 sigma wide
    return with_chunking(
        magnet(), routed_parameters=False, losses=(Hinge.Config(sigmas=sigmas),),
        route_target_ratios=tuple(1 / rate for rate in rates),
    )  # fmt: skip


SYSTEMS = (
    hnet, hnet_space, hnet_pool, spacebyte, dtp_gumbel, dtp_entropy, dtp_unigram, dtp_whitespace,
    dtp_fixed, magnet, flexitokens,
)  # fmt: skip
