"""Systems with a word encoder and a decoder that starts again at each word, by their names.

    python -m experiments.pretrain hat_whitespace --data.files 'books/*.txt'

All have the main network of the default configuration, about 5 minutes on two CPU cores. A word
ends at a white space character, which belongs to it, or after its maximal length (hat_words has
another rule). Tokens before the bytes of a word are encoded with them in both directions; their
outputs are positions of the main network. Vectors of its outputs are the first positions of a
decoder that sees only them and the next word; the last of them replaces the word's
last byte. So there is no end-of-word symbol: the byte of white space ends a word. Streams work: no
rule needs a later byte.

The decoder has two layers of Mamba-2, the common layers of bytes, with which 100 updates are below
a model of order 2. The papers have Transformers there:

    --model.stages.0.arch_layout '' T2          (tfree_hat: '' x1T1x1T1)
"""

from dataclasses import replace

from experiments.configs import default
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.dechunks import prefix as dechunks
from hnet.chunking.pools.prefix import Prefix
from hnet.chunking.predictors.hat_words import HatWords
from hnet.config import HNetConfig, StageConfig

READER = "x1m1x1m1"
"""layers of a decoder that reads the vectors of words"""


def hat_whitespace() -> HNetConfig:
    """HAT: words by white space, with an encoder and a decoder of each word.

    Paper: arXiv 2501.10322
    Fidelity: from the paper, which has no code of its network: encoder, backbone, decoder restarted
    at each word, with the vector of the word before as its first position; no end-of-word symbol,
    words of at most 32 bytes; Mamba-2 in the decoder, a Transformer by option
    Test: tests/test_battery.py, tests/parts, tests/chunking/test_dechunk.py
    """
    return _of_words(Prefix.Config(1, 32, 2, num_heads=4, d_intermediate=256), 5.7)


def hat_words() -> HNetConfig:
    """HAT with the words of its released splitter: UAX #29, punctuation, camelCase.

    Paper: arXiv 2501.10322
    Fidelity: as hat_whitespace; words as in hat-splitter, with its limit at 28 bytes, but for white
    space before a combining mark and a fraction slash; a word's end is known at the next character,
    which the decoder of the word before still predicts
    Test: tests/chunking/test_words.py: words of 153 texts, with and without limits
    """
    base = hat_whitespace()
    outer, main = base.stages
    chunking = replace(
        outer.chunking, predictor=HatWords.Config(limit=28), alignment="start", null="learned",
        target_ratio=4.6,
    )  # fmt: skip
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
    restarted at each word after the 4 outputs for the word before, as in avi-jit/eTok; words of at
    most 12 bytes; Mamba-2 in the decoder, a Transformer by option; there is no padded canvas, so
    padding does not end a word
    Test: tests/chunking/systems/test_learn_your_tokens.py: its whole network, with its blocks;
    tests/test_battery.py, tests/parts, tests/chunking/test_dechunk.py
    """
    pool = Prefix.Config(4, 12, 2, num_heads=4, d_intermediate=256)
    return _of_words(pool, 5.0, dechunks.Prefix.Config(4))


def byte2word() -> HNetConfig:
    """Byte2Word's pooling: one layer of attention over the bytes of a word.

    Paper: arXiv 2211.12162
    Fidelity: pooling only, from the abstract, as there is no code: a causal model of bytes instead
    of a BERT with a subword head; the query is a token that also sees itself
    Test: tests/test_battery.py, tests/parts
    """
    return _of_words(Prefix.Config(1, 16, 1, num_heads=4), 5.4)


def _of_words(
    pool: Prefix.Config, bytes_per_word: float, dechunk: dechunks.Prefix.Config | None = None
) -> HNetConfig:
    base = default.config().model
    chunking = ChunkingConfig(
        bytes_per_word, "unicode_whitespace", "end", "first", pool,
        dechunk or dechunks.Prefix.Config(), "add", decoder_scope="chunk",
        max_chunk_len=pool.length, losses=(),
    )  # fmt: skip
    outer = StageConfig(("", "m2"), 128, 256, num_heads=4, rotary_emb_dim=16, chunking=chunking)
    return replace(base, stages=(outer, base.stages[-1]))
