"""MEGABYTE (arXiv 2305.07185) with 2 and 3 stages at the size of the default configuration.

    python -m experiments.pretrain megabyte_2 --data.files 'books/*.txt'

The first byte of a document (BOS) is a patch of its own and takes the place of the learned start
patch. A patch is its bytes' embeddings side by side, with norm, linear map and norm; the local
model starts again at each patch, and reads its bytes plus one linear map of the global state for
each position in the patch. As in the paper, the last byte of a patch already predicts the next
patch's first byte from the global state of its own patch; in lucidrains/MEGABYTE-pytorch it sees
only the patch before.

The local model has layers of Mamba-2, the common layers of bytes; Transformers as in the paper are
--model.stages.0.arch_layout '' T2 (megabyte_3: '' T1).
"""

from dataclasses import replace

from experiments.configs import default
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.dechunks.indexed import Indexed
from hnet.chunking.pools.concat import Concat
from hnet.config import HNetConfig, StageConfig


def megabyte_2() -> HNetConfig:
    """MEGABYTE with patches of 8 bytes.

    Paper: arXiv 2305.07185
    Fidelity: patches, pool and way back as in lucidrains/MEGABYTE-pytorch at commit 21eec73, the
    position of the global state as in the paper; one table of byte embeddings, which are normed,
    Mamba-2 in the local model (a Transformer by option), no token shift
    Test: tests/chunking/test_words.py: patch vectors and the states added to bytes;
    tests/chunking/systems/test_megabyte.py: logits, loss and gradients with the alignment and
    the layers of its code
    """
    base = default.config().model
    local = StageConfig(
        ("", "m2"), 128, 256, num_heads=4, rotary_emb_dim=16, chunking=_patches(8)
    )  # fmt: skip
    return replace(base, stages=(local, base.stages[-1]))


def megabyte_3() -> HNetConfig:
    """MEGABYTE with patches of 4 bytes and of 4 patches.

    Paper: arXiv 2305.07185
    Fidelity: as megabyte_2; larger patches are made of states of the smaller ones, there of bytes
    Test: tests/chunking/test_words.py: patch vectors and the states added to bytes
    """
    base = megabyte_2()
    local, main = base.stages
    local = replace(local, arch_layout=("", "m2"), chunking=_patches(4))
    middle = StageConfig(
        ("", "T2"), 192, 384, num_heads=4, rotary_emb_dim=24, chunking=_patches(4)
    )  # fmt: skip
    return replace(base, stages=(local, middle, main))


def _patches(length: int) -> ChunkingConfig:
    return ChunkingConfig(
        float(length), "fixed", "end", "first", Concat.Config(length),
        Indexed.Config(length, shared=False, bias=True), "add", decoder_scope="chunk", losses=(),
    )  # fmt: skip
