"""AU-Net (arXiv 2506.14761) with 2 and 3 stages at the size of the default configuration.

    python -m experiments.pretrain au_net_3 --data.files 'books/*.txt'

About 5 minutes on two CPU cores. As in facebookresearch/lingua (apps/aunet): the strategies word1
and word1+word2, a chunk's state at its last byte, norm and linear map to the inner width, a shared
and an indexed linear map (distance modulo 16) on the way back, the encoder's states added, and the
first position of a document as a chunk. Different:

* A newline after other white space gives its level where it is, not at an earlier byte: the
  reference changes the level of a byte that was already read (in 6 of 153 texts).
* Blocks are those of the default configuration, and each stack ends with a norm; the reference has
  attention in all stages and one norm before the head.
* The reference fills unused slots with further positions; they are empty here.
* Bytes that are not UTF-8 end no character here; the reference replaces them by U+FFFD.
* Strategies `pretok` and `punct` are left out: they decide by later characters.
"""

from dataclasses import replace

from experiments.configs import default
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.predictors.words import Words
from hnet.config import HNetConfig, StageConfig

PARTS = dict(
    alignment="end", null="first", pool="linear", dechunk="indexed", residual="add", losses=()
)


def au_net_2() -> HNetConfig:
    """AU-Net with 2 stages: bytes and words.

    Paper: arXiv 2506.14761
    Fidelity: levels, pool and way back as in facebookresearch/lingua at commit 437d680, but a
    newline after other white space does not change an earlier byte; blocks of the default
    Test: tests/chunking/test_words.py: levels of 153 texts, pool, dechunk, gradients;
    tests/chunking/systems/test_au_net.py: the network of 3 stages
    """
    base = default.config().model
    outer, main = base.stages
    chunking = ChunkingConfig(5.0, Words.Config(every=(1,)), **PARTS)
    return replace(base, stages=(replace(outer, chunking=chunking), main))


def au_net_3() -> HNetConfig:
    """AU-Net with 3 stages: bytes, words and pairs of words.

    Paper: arXiv 2506.14761
    Fidelity: levels, pool and way back as in facebookresearch/lingua at commit 437d680, but a
    newline after other white space does not change an earlier byte; blocks of the default
    Test: tests/chunking/test_words.py: levels of 153 texts, masks, pool, dechunk, gradients;
    tests/chunking/systems/test_au_net.py: logits, loss and all gradients of its network
    """
    base = au_net_2()
    outer, main = base.stages
    chunking = replace(outer.chunking, predictor=Words.Config(every=(1, 2)))
    middle = StageConfig(
        ("T1", "T1"), 192, 384, num_heads=4, rotary_emb_dim=24,
        chunking=ChunkingConfig(2.0, "levels", **PARTS),
    )  # fmt: skip
    return replace(base, stages=(replace(outer, chunking=chunking), middle, main))
