"""BLT (arXiv 2412.09871) and its relatives that pool and read chunks by cross-attention.

    python -m experiments.pretrain blt_cross --data.files 'books/*.txt'

About 8 minutes on two CPU cores. They share the network of the default configuration, with layers
of cross-attention before those of the decoder.
"""

from dataclasses import replace

from experiments.configs.systems import hnet
from hnet.chunking.dechunks import cross_attention as dechunks
from hnet.chunking.pools import cross_attention as pools
from hnet.config import HNetConfig


def blt_cross() -> HNetConfig:
    """BLT with cross-attention between bytes and patches, which end at a spacelike byte.

    Paper: arXiv 2412.09871
    Fidelity: two queries per patch from the maximum over its bytes, two vectors per patch read
    before every layer of the decoder, residual of the encoder, as in facebookresearch/blt; its code
    adds queries twice, ours once (option of the pool); patches by spaces instead of entropy, of at
    most 32 bytes; no hashed n-grams
    Test: tests/chunking/test_cross_attention.py: pool, layers and masks of its code
    """
    return _crossed(
        decoder="x1m1x1m1", predictor="spacelike", pool=pools.CrossAttention.Config(2),
        dechunk=dechunks.CrossAttention.Config(2),
    )  # fmt: skip


def blt_cross_static() -> HNetConfig:
    """BLT with cross-attention and patches of 6 bytes.

    Paper: arXiv 2412.09871
    Fidelity: as blt_cross, with patches of a fixed length; the first has one byte
    Test: tests/chunking/test_cross_attention.py: pool, layers and masks of its code
    """
    return _crossed(
        decoder="x1m1x1m1", predictor="fixed", target_ratio=6.0,
        pool=pools.CrossAttention.Config(2), dechunk=dechunks.CrossAttention.Config(2),
    )  # fmt: skip


def tfree_hat() -> HNetConfig:
    """TFree-HAT: words pooled by cross-attention; a decoder restarts at each word and reads it.

    Paper: arXiv 2603.15953
    Fidelity: from descriptions, without code: one learned query per word, an encoder and a decoder
    that see one word; ours is causal within a word, ends words after a space or 32 bytes (there:
    100) and passes encoder states to the decoder
    Test: tests/parts/test_combinations.py
    """
    return _crossed(
        decoder="x1m1x1m1", predictor="whitespace",
        pool=pools.CrossAttention.Config(queries="learned"),
        dechunk=dechunks.CrossAttention.Config(), encoder_scope="chunk", decoder_scope="chunk",
    )  # fmt: skip


def _crossed(*, decoder: str, **fields) -> HNetConfig:
    base = hnet()
    outer, *inner = base.stages
    chunking = replace(
        outer.chunking,
        **{"alignment": "end", "null": "first", "residual": "add", "losses": (),
           "max_chunk_len": 32, **fields},
    )  # fmt: skip
    outer = replace(outer, arch_layout=(outer.arch_layout[0], decoder), chunking=chunking)
    return replace(base, stages=(outer, *inner))
