"""SuperBPE (arXiv 2503.13423): a BPE that goes on without pre-tokenization, so that its later
tokens span words. Unlike the paper, superwords have no limit of four words and may contain
punctuation.
"""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hnet.data.tokenizers.bpe import train_bpe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUBWORDS = 0.8  # share of the superbpe vocabulary that is learned within words, as in the paper
_BREAK = -1  # between two texts


def train_superbpe(texts: Sequence[bytes], vocab_size: int) -> "Tokenizer":
    """BPE within words up to SUBWORDS of the vocabulary, then merges across words."""
    import tokenizers as lib

    first = train_bpe(texts, max(256, round(SUBWORDS * vocab_size)))
    content = json.loads(first.to_str())["model"]
    numbers = dict(content["vocab"])
    merges = [tuple(pair) for pair in content["merges"]]
    rows = [first.encode(text.decode()).ids for text in texts]
    for pair in merges_across(rows, numbers, vocab_size):
        merges.append(pair)
    tokenizer = lib.Tokenizer(lib.models.BPE(numbers, merges))
    level = lib.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = level(add_prefix_space=False, use_regex=False)
    return tokenizer


def merges_across(
    rows: Sequence[Sequence[int]], numbers: dict[str, int], vocab_size: int
) -> Iterator[tuple[str, str]]:
    """Yield the merges of BPE on rows of token numbers, and add their tokens to `numbers`.

    The most frequent pair of neighbours is merged, the smallest numbers first among equals, until
    there are `vocab_size` tokens or no pair occurs twice.
    """
    names = {number: token for token, number in numbers.items()}
    ids = np.concatenate([np.append(np.asarray(row, np.int64), _BREAK) for row in rows])
    while len(numbers) < vocab_size:
        within = (ids[:-1] != _BREAK) & (ids[1:] != _BREAK)
        pairs, counts = np.unique((ids[:-1] * vocab_size + ids[1:])[within], return_counts=True)
        if not len(pairs) or counts.max() < 2:
            return
        left, right = divmod(int(pairs[np.argmax(counts)]), vocab_size)
        token = names[left] + names[right]
        number = numbers.setdefault(token, len(numbers))
        names[number] = token
        at = (ids[:-1] == left) & (ids[1:] == right)
        if left == right:  # in a run of equal tokens every other pair
            at &= _offset_in_run(at) % 2 == 0
        ids[:-1][at] = number
        ids = np.delete(ids, np.flatnonzero(at) + 1)
        yield names[left], names[right]


def _offset_in_run(mask: np.ndarray) -> np.ndarray:
    """For each position, the number of positions since its run of equal values began."""
    index = np.arange(len(mask))
    begins = np.append(True, mask[1:] != mask[:-1])
    return index - np.maximum.accumulate(np.where(begins, index, 0))
