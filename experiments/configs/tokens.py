"""Transformers over tokens, by the name of their tokenizer: the baselines with a fixed vocabulary.

    python -m experiments.pretrain superbpe --data.files 'books/*.txt'

The vocabulary is learned from the first MB of the training text at the first start and kept in the
work directory (tokenizer.json, extra `bpe`); --data.tokenizer bpe:4096 --model.vocab_size 4096 make
it larger. The network is that of bytes_transformer. `evaluate` gives bits per byte by tokens, with
--exact True also those of the bytes; `generate` draws bytes; `segment` shows tokens.
"""

from dataclasses import replace

from experiments.configs import default
from experiments.configs.isotropic import bytes_transformer
from hnet.train.config import Config

SIZE = 2048


def bpe() -> Config:
    """BPE: a Transformer over 2048 tokens, merged by frequency within words.

    Paper: arXiv 1508.07909
    Fidelity: byte-level, with the pre-tokenization of GPT-2, by the library tokenizers; evaluation
    over bytes as in arXiv 2410.09303
    Test: tests/decode/test_covers.py: probabilities of next bytes of the code of 2410.09303
    """
    return _over("bpe")


def unigram() -> Config:
    """Unigram: a Transformer over the most probable segmentation into 2048 pieces.

    Paper: arXiv 1804.10959
    Fidelity: byte-level, with the pre-tokenization of GPT-2, by the library tokenizers; no sampling
    of segmentations
    Test: tests/decode/test_covers.py: sums over all sequences of tokens
    """
    return _over("unigram")


def superbpe() -> Config:
    """SuperBPE: a BPE whose last fifth of tokens may span words.

    Paper: arXiv 2503.13423
    Fidelity: two stages as in the paper; in the second there is no pre-tokenization at all, where
    the paper's keeps groups of digits and punctuation, and words per token have no limit
    Test: tests/experiments/test_compare.py: merges of a slow loop
    """
    return _over("superbpe")


def lib() -> Config:
    """LiB, "Less is Better": greedy longest matches from a list that a simulated reader orders.

    Paper: Yang, Frank and van den Bosch 2020
    Fidelity: memory, proposals, votes and forgetting as in ray306/LiB, written anew; chunks are of
    bytes instead of characters, up to 12, learned from 128 KB, and moves happen after each batch
    Test: tests/data/test_tokenizers.py
    """
    return _over("lib")


def equal_info() -> Config:
    """Equal-Info Windows: a Transformer over windows that a byte model codes in 11 bits.

    Paper: arXiv 2404.03626
    Fidelity: windows as in the paper, one token each, model and coder started anew at each; the
    model counts up to 3 bytes of context (`experiments.tokenizer --model` takes a network instead)
    and each window has a number for its end, in place of padding
    Test: tests/data/test_tokenizers.py: lossless on any bytes, information per window
    """
    return _over("equal_info")


def _over(kind: str) -> Config:
    base = default.config()
    return replace(
        base,
        model=replace(bytes_transformer(), vocab_size=SIZE),
        data=replace(base.data, tokenizer=f"{kind}:{SIZE}"),
        optim=replace(base.optim, lr_multipliers="none"),  # the published ones are for bytes
    )
