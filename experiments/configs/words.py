"""Systems with a word encoder and a decoder that starts again at each word, by their names.

    python -m experiments.pretrain hat_whitespace --data.files 'books/*.txt'

All have the main network of the default configuration, about 5 minutes on two CPU cores. A word
ends at a white space character, which belongs to it, or after its maximal length (hat_words has
another rule). Tokens before the bytes of a word are encoded with them in both directions; their
outputs are positions of the main network. Its output for a word enters the decoder at the word's
last byte, from where the decoder sees only the next word. So there is no end-of-word symbol: the
byte of white space ends a word. Streams work: no rule needs a later byte.
"""

from dataclasses import replace

from experiments.configs import default
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.dechunks.cross_attention import CrossAttention
from hnet.chunking.dechunks.indexed import Indexed
from hnet.chunking.pools.prefix import Prefix
from hnet.config import HNetConfig, StageConfig

READER = "x1T1x1T1"
"""layers of a decoder that reads the vectors of words"""


def hat_whitespace() -> HNetConfig:
    """HAT: words by white space, encoded and decoded by Transformers of their own.

    Paper: arXiv 2501.10322
    Fidelity: from the paper, which has no code of its network: encoder, backbone, decoder restarted
    at each word; no end-of-word symbol, words of at most 32 bytes, and the word's vector is added
    to the embedding of its last byte instead of standing before the next word
    Test: tests/test_battery.py, tests/parts
    """
    return _of_words(Prefix.Config(1, 32, 2, num_heads=4, d_intermediate=256), 5.7)


def hat_words() -> HNetConfig:
    """HAT with the words of its released splitter: UAX #29, punctuation, camelCase.

    Paper: arXiv 2501.10322
    Fidelity: as hat_whitespace; words as in hat-splitter but for white space before a combining
    mark and a fraction slash; a word's end is known at the next character, which the decoder of the
    word before still predicts
    Test: tests/chunking/test_words.py: words of 153 texts
    """
    base = hat_whitespace()
    outer, main = base.stages
    chunking = replace(
        outer.chunking, predictor="hat_words", alignment="start", null="learned", target_ratio=4.6
    )
    return replace(base, stages=(replace(outer, chunking=chunking), main))


def tfree_hat() -> HNetConfig:
    """T-Free HAT: HAT whose decoder reads the word's vector by cross-attention.

    Paper: arXiv 2603.15953
    Fidelity: from the paper's description, as there is no code: as hat_words, with a layer of
    cross-attention before each layer of the decoder; the encoder pools with a token, not by
    cross-attention
    Test: tests/parts
    """
    base = hat_words()
    outer, main = base.stages
    chunking = replace(outer.chunking, dechunk="cross_attention")
    return replace(base, stages=(replace(outer, arch_layout=("", READER), chunking=chunking), main))


def learn_your_tokens() -> HNetConfig:
    """Learn Your Tokens: 4 tokens for each word.

    Paper: arXiv 2310.11628
    Fidelity: encoder of tokens and bytes, 4 positions of the main network for each word, decoder
    restarted at each word; words of at most 12 bytes; the decoder reads the 4 outputs by
    cross-attention, in avi-jit/eTok they stand before the bytes; there is no padded canvas, so
    padding does not end a word
    Test: tests/test_battery.py, tests/parts
    """
    base = _of_words(Prefix.Config(4, 12, 2, num_heads=4, d_intermediate=256), 5.0)
    outer, main = base.stages
    chunking = replace(outer.chunking, dechunk=CrossAttention.Config(4))
    return replace(base, stages=(replace(outer, arch_layout=("", READER), chunking=chunking), main))


def byte2word() -> HNetConfig:
    """Byte2Word's pooling: one layer of attention over the bytes of a word.

    Paper: arXiv 2211.12162
    Fidelity: pooling only, from the abstract, as there is no code: a causal model of bytes instead
    of a BERT with a subword head; the query is a token that also sees itself
    Test: tests/test_battery.py, tests/parts
    """
    return _of_words(Prefix.Config(1, 16, 1, num_heads=4), 5.4)


def _of_words(pool: Prefix.Config, bytes_per_word: float) -> HNetConfig:
    base = default.config().model
    chunking = ChunkingConfig(
        bytes_per_word, "unicode_whitespace", "end", "first", pool,
        Indexed.Config(shared=False, at_boundaries=True), "add", decoder_scope="chunk",
        max_chunk_len=pool.length, losses=(),
    )  # fmt: skip
    outer = StageConfig(("", "T2"), 128, 256, num_heads=4, rotary_emb_dim=16, chunking=chunking)
    return replace(base, stages=(outer, base.stages[-1]))
