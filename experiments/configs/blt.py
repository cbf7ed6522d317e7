"""Byte Latent Transformer (BLT): patches of bytes, at the common small size of `systems`.

    python -m experiments.pretrain blt_space --data.files 'text/*.txt'

Patches of entropy need a byte model, which is trained first, on the same text:

    python -m experiments.pretrain blt_bytes --data.files 'text/*.txt'
    python -m experiments.pretrain blt_entropy --data.files 'text/*.txt'

All have hashed n-gram embeddings (n = 3 to 8) and END alignment in which the first byte of a
document is a patch of its own, as in facebookresearch/blt. `blt` is the whole system. In the others
a patch is the mean of its bytes' states and its output is added to the bytes after it, as in that
code without cross-attention, and the layers are those of `default` (Mamba-2 around attention). What
differs: the tables of n-grams have 2,048 rows instead of 500,002 and begin at a small scale;
n-grams, entropies, patches and cross-attention do not cross documents.
"""

from dataclasses import replace

from experiments.configs import default, systems
from hnet.chunking.dechunks import cross_attention as dechunks
from hnet.chunking.pools import cross_attention as pools
from hnet.config import HNetConfig, StageConfig
from hnet.nn.embeddings.hash_ngrams import HashNgrams
from hnet.second_model.entropy import Entropy

MODEL = "runs/blt_bytes"


def _patched(**chunking) -> HNetConfig:
    base = replace(default.config().model, embedding=HashNgrams.Config(rows=2048))
    return systems.with_chunking(
        base, alignment="end", null="first", pool="mean", dechunk="repeat", residual="add",
        losses=(), **chunking,
    )  # fmt: skip


def blt_bytes() -> HNetConfig:
    """Byte model whose entropies cut the patches of blt_entropy and blt_monotonic.

    Paper: arXiv 2412.09871
    Fidelity: a Transformer over bytes with a window, as in the paper, which has 14 layers of width
    768 and a window of 512; here 3 of 128 and 128
    Test: tests/chunking/test_blt.py: entropy of the logits
    """
    stage = StageConfig(("T3",), 128, 384, num_heads=4, rotary_emb_dim=32, window_size=128)
    return replace(default.config().model, stages=(stage,))


def blt() -> HNetConfig:
    """BLT: patches of entropy, hashed n-grams, and cross-attention between bytes and patches.

    Paper: arXiv 2412.09871
    Fidelity: as in facebookresearch/blt with a pool and vectors of 2 queries, but queries are added
    once, patches have at most 32 bytes, and their threshold is held at 4.5 bytes per patch while
    training; local layers are Mamba-2, or by option Transformers that see 128 bytes
    (--model.stages.0.arch_layout T1 x1T1x1T1x1T1); no boundaries at the k highest entropies, which
    need the whole row, and no n-grams looked up in a list
    Test: tests/chunking/systems/test_blt.py: logits, loss and all gradients of its network
    """
    base = blt_entropy()
    outer, inner = base.stages
    chunking = replace(
        outer.chunking, pool=pools.CrossAttention.Config(2),
        dechunk=dechunks.CrossAttention.Config(2), max_chunk_len=32,
    )  # fmt: skip
    outer = replace(
        outer, arch_layout=("m1", "x1m1x1m1x1m1"), window_size=127, chunking=chunking,
        d_intermediate=384, num_heads=4, rotary_emb_dim=32,
    )  # fmt: skip
    return replace(base, stages=(outer, inner))


def blt_static() -> HNetConfig:
    """BLT with patches of 4 bytes.

    Paper: arXiv 2412.09871
    Fidelity: ids of n-grams as in facebookresearch/blt, whose forward pass cannot run these
    patches; means of patches, no cross-attention; other layers
    Test: tests/parts/test_embeddings.py, tests/chunking/test_blt.py: ids, mean pool and gradient
    """
    return _patched(predictor="fixed", target_ratio=4.0)


def blt_space() -> HNetConfig:
    """BLT with patches that end with the first byte of each run of spacelike bytes.

    Paper: arXiv 2412.09871
    Fidelity: boundaries (within a document) and ids of n-grams as in facebookresearch/blt; means of
    patches, no cross-attention; other layers
    Test: tests/chunking/test_blt.py: boundaries, mean pool and gradient
    """
    return _patched(predictor="spacelike", target_ratio=6.0)


def blt_entropy() -> HNetConfig:
    """BLT with patches that end where a byte model (blt_bytes) has a high entropy.

    Paper: arXiv 2412.09871
    Fidelity: boundaries of given entropies and ids of n-grams as in facebookresearch/blt; the
    threshold is held at 4.5 bytes per patch while training; means of patches, no cross-attention;
    other layers
    Test: tests/chunking/test_blt.py: boundaries, entropy, mean pool and gradient
    """
    return _patched(predictor=Entropy.Config(MODEL), target_ratio=4.5, hold_rate=True)


def blt_monotonic() -> HNetConfig:
    """BLT with patches that end where the entropy of a byte model (blt_bytes) rises.

    Paper: arXiv 2412.09871
    Fidelity: as blt_entropy, with the rule "monotonic", which also ends the second byte's patch
    Test: tests/chunking/test_blt.py: boundaries, entropy, mean pool and gradient
    """
    predictor = Entropy.Config(MODEL, rule="monotonic", increase=0.5)
    return _patched(predictor=predictor, target_ratio=4.5, hold_rate=True)
