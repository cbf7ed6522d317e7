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

A system with a target and a learned predictor holds its rate (`hold_rate`): in the last updates an
offset on the logit of p brings the rate to the target, which the losses reach only in long
runs. `--model.stages.0.chunking.hold_rate False` leaves it to the losses.

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
from hnet.train.config import Config

INDIC = ("Devanagari", "Bengali", "Telugu")


def with_chunking(base: HNetConfig, **fields) -> HNetConfig:
    """`base` with fields of its outermost stage's chunking replaced."""
    outer, *inner = base.stages
    outer = replace(outer, chunking=replace(outer.chunking, **fields))
    return replace(base, stages=(outer, *inner))


def one_stage(target_ratio: float, **fields) -> HNetConfig:
    """The network that the systems share, with fields of its chunking replaced."""
    return with_chunking(default.config().model, target_ratio=target_ratio, **fields)


def hnet() -> HNetConfig:
    """H-Net with one stage, target 6.

    Paper: arXiv 2507.07955
    Fidelity: as in goombalab/hnet; the rate loss is averaged over valid bytes; the rate is held
    Test: tests/interop/test_parity.py: all outputs and gradients of the official model
    """
    return one_stage(6.0, hold_rate=True)


def hnet_space() -> HNetConfig:
    """H-Net(space): H-Net with boundaries at spaces; p is 0 or 1, so nothing is smoothed.

    Paper: arXiv 2507.07955
    Fidelity: from the paper, which has no code for it: H-Net with another router
    Test: tests/test_battery.py
    """
    return one_stage(6.0, predictor="spacelike", dechunk="repeat", losses=())


def hnet_pool() -> HNetConfig:
    """H-Net(pool): a boundary every 6 bytes.

    Paper: arXiv 2507.07955
    Fidelity: from the paper, which has no code for it: H-Net with another router
    Test: tests/test_battery.py
    """
    return with_chunking(hnet_space(), predictor="fixed")


def spacebyte() -> HNetConfig:
    """SpaceByte: global states are added where a word begins, nowhere else.

    Paper: arXiv 2404.14408
    Fidelity: boundaries and insertion as in kjslag/spacebyte if BOS begins a document; a wider
    stage is padded at the end, not in front; rotary positions
    Test: tests/chunking/systems/test_spacebyte.py: boundaries, gather, insertion, overflow,
    gradients; its whole network, with its blocks
    """
    return with_chunking(hnet_space(), dechunk="at_boundaries", residual="add", overflow="ignore")


def spacebyte_plus() -> HNetConfig:
    """SpaceByte++: SpaceByte with Mamba-2 and an MLP in the layers of bytes.

    Paper: arXiv 2507.07955
    Fidelity: a baseline of the H-Net paper, which has no code for it: M4+T28+M4 there, M2+T4+M2
    here; boundaries and insertion of SpaceByte, no norms or projections around the main network but
    those of our stacks
    Test: tests/chunking/systems/test_spacebyte.py: SpaceByte's boundaries, gather, insertion,
    gradients
    """
    base = spacebyte()
    outer, *inner = base.stages
    outer = replace(outer, arch_layout=("M2", "M2"), d_intermediate=384)
    return replace(base, stages=(outer, *inner))


def dtp_gumbel() -> HNetConfig:
    """Dynamic token pooling with a relaxed Bernoulli and a binomial prior of .2.

    Paper: arXiv 2211.09761
    Fidelity: chunking as in PiotrNawrot/dynamic-pooling; pre-norm blocks, no norm after the
    pool; the rate is held
    Test: tests/chunking/systems/test_dtp.py: its whole network, with its blocks
    """
    return one_stage(
        5.0, predictor="mlp", alignment="end", pool="mean", dechunk="repeat",
        residual="add", losses=("binomial",), hold_rate=True,
    )  # fmt: skip


def dtp_entropy() -> HNetConfig:
    """Dynamic token pooling with a predictor of the model's own entropy spikes.

    Paper: arXiv 2211.09761
    Fidelity: chunking as in its code: the loss takes the sigmoid of p itself
    Test: tests/chunking/systems/test_dtp.py: its whole network, with its blocks
    """
    return with_chunking(
        dtp_gumbel(),
        predictor=MLP.Config(straight_through=False),
        losses=(BCE.Config(reference_double_sigmoid=True),),
        hold_rate=False,
    )


def dtp_unigram() -> Config:
    """Dynamic token pooling with a predictor of the cuts of a unigram model of the text.

    Paper: arXiv 2211.09761
    Fidelity: chunking as in its code: the loss takes the sigmoid of p itself; the unigram model is
    trained on the text of the run, and cuts in the first word of a row are not shifted
    Test: tests/chunking/systems/test_dtp.py: its whole network, with its blocks
    """
    base, loss = default.config(), BCE.Config(labels="given", reference_double_sigmoid=True)
    return replace(
        base,
        model=with_chunking(dtp_entropy(), losses=(loss,)),
        data=replace(base.data, labels="unigram:10000"),
    )


def dtp_whitespace() -> HNetConfig:
    """Dynamic token pooling with a boundary after every space.

    Paper: arXiv 2211.09761
    Fidelity: chunking as in its code
    Test: tests/chunking/systems/test_dtp.py: its whole network, with its blocks
    """
    return with_chunking(dtp_gumbel(), predictor="whitespace", losses=(), hold_rate=False)


def dtp_fixed() -> HNetConfig:
    """Dynamic token pooling with a boundary every 4 bytes.

    Paper: arXiv 2211.09761
    Fidelity: chunking as in its code
    Test: tests/chunking/systems/test_dtp.py: its whole network, with its blocks
    """
    return with_chunking(dtp_whitespace(), predictor="fixed", target_ratio=4.0)


def magnet() -> HNetConfig:
    """MAGNET: dynamic token pooling with one predictor and one prior per script.

    Paper: arXiv 2407.08818
    Fidelity: chunking as in pretraining by its code; a position has the script of its text so
    far, there the first token of a row decides; the rate of each script is held
    Test: tests/chunking/systems/test_magnet.py: predictors by script, pool, loss and their
    gradients
    """
    base = replace(dtp_gumbel(), route_groups=(("Latin",), ("Cyrillic",), INDIC))
    ratios = (5.0, 5.0, 10.0, 12.5)  # the first is for all other scripts
    return with_chunking(
        base, routes=4, route_target_ratios=ratios, losses=(Binomial.Config(average="routes"),)
    )


def flexitokens() -> HNetConfig:
    """FlexiTokens: one predictor, a hinge with a band of rates for each script.

    Paper: arXiv 2507.12720
    Fidelity: chunking as in owos/flexitokens, band 1/N - 3 sigma to 1/N of each script
    Test: tests/chunking/systems/test_magnet.py: boundaries, hinge and its gradients
    """
    rates = (0.333, 0.333, 0.17, 0.127)  # English, Russian and Ukrainian, Hindi and Telugu
    sigmas = (0.023, 0.023, 0.0115, 0.0085)  # the shipped rates: the band is 3 sigma wide
    return with_chunking(
        magnet(), routed_parameters=False, losses=(Hinge.Config(sigmas=sigmas),), hold_rate=False,
        route_target_ratios=tuple(1 / rate for rate in rates),
    )  # fmt: skip


SYSTEMS = (
    hnet, hnet_space, hnet_pool, spacebyte, dtp_gumbel, dtp_entropy, dtp_whitespace, dtp_fixed,
    magnet, flexitokens,
)  # fmt: skip
