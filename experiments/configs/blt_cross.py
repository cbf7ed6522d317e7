"""BLT (arXiv 2412.09871) with cross-attention between bytes and patches.

    python -m experiments.pretrain blt_cross --data.files 'books/*.txt'

About 8 minutes on two CPU cores. They share the network of the default configuration, with layers
of cross-attention before those of the decoder.
"""

from dataclasses import replace

from experiments.configs.systems import one_stage
from hnet.chunking.dechunks import cross_attention as dechunks
from hnet.chunking.pools import cross_attention as pools
from hnet.config import HNetConfig


def blt_cross() -> HNetConfig:
    """BLT with cross-attention between bytes and patches, which end at a spacelike byte.

    Paper: arXiv 2412.09871
    Fidelity: two queries per patch from the maximum over its bytes, two vectors per patch read
    before every layer of the decoder, residual of the encoder, as in facebookresearch/blt; its code
    adds queries twice, ours once (option of the pool); patches by spaces instead of entropy, of at
    most 32 bytes; no hashed n-grams (`blt` has both)
    Test: tests/chunking/test_cross_attention.py: pool, layers and masks of its code;
    tests/chunking/systems/test_blt.py: a whole network
    """
    return _crossed(predictor="spacelike")


def blt_cross_static() -> HNetConfig:
    """BLT with cross-attention and patches of 6 bytes.

    Paper: arXiv 2412.09871
    Fidelity: as blt_cross, with patches of a fixed length; the first has one byte
    Test: tests/chunking/test_cross_attention.py: pool, layers and masks of its code
    """
    return _crossed(predictor="fixed", target_ratio=6.0)


def _crossed(**fields) -> HNetConfig:
    base = one_stage(6.0)
    outer, *inner = base.stages
    chunking = replace(
        outer.chunking, alignment="end", null="first", residual="add", losses=(), max_chunk_len=32,
        pool=pools.CrossAttention.Config(2), dechunk=dechunks.CrossAttention.Config(2), **fields,
    )  # fmt: skip
    outer = replace(outer, arch_layout=(outer.arch_layout[0], "x1m1x1m1"), chunking=chunking)
    return replace(base, stages=(outer, *inner))
