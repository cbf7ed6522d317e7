"""Merges of a batch: its most frequent pairs of tokens become tokens of their own.

Dynamic re-tokenisation (Feher, Vulic and Minixhofer 2025, section 3): BPE merges that are found in
each batch anew, so that its rows are shorter. A merge stays inside a word of the tokenizer's
pre-tokenization.
"""

from collections import Counter
from collections.abc import Callable, Sequence

Token = tuple[int, ...]
"""a token of the batch: the ids of the tokenizer that it consists of"""


def merge_batch(
    rows: Sequence[Sequence[Token]],
    num_merges: int,
    may_merge: Callable[[Token, Token], bool],
    most: int = 16,
) -> tuple[list[list[Token]], int]:
    """(the rows after up to `num_merges` merges, number of merges).

    Each merge is of the most frequent pair of neighbours, the smallest among equals. Pairs that
    occur once stay. most: ids per token.
    """
    rows = [list(row) for row in rows]
    for done in range(num_merges):
        counts = Counter(pair for row in rows for pair in zip(row, row[1:]))
        allowed = [
            (-count, pair) for pair, count in counts.items()
            if count > 1 and sum(map(len, pair)) <= most and may_merge(*pair)
        ]  # fmt: skip
        if not allowed:
            return rows, done
        _, (left, right) = min(allowed)
        for row in rows:
            at = 0
            while at < len(row) - 1:
                if row[at] == left and row[at + 1] == right:
                    row[at : at + 2] = [left + right]
                at += 1
    return rows, num_merges
