"""Exact probabilities of bytes from a model of tokens (arXiv 2410.09303).

A cover of x_1..x_n is a canonical sequence of tokens that spells at least x_1..x_n and whose last
token is needed for that. The probability that a text begins with x_1..x_n is the sum of the
probabilities of its covers, and the probability of the next byte is a quotient of two such sums. As
in the code of the paper, the sums over canonical sequences are normalised over the next byte.
"""

from collections.abc import Callable, Sequence

import numpy as np

Ids = tuple[int, ...]


class Pieces:
    """What each token spells, as symbols: bytes, or further numbers for special tokens."""

    def __init__(self, pieces: Sequence[Sequence[int]], num_symbols: int = 256):
        self.num_symbols = num_symbols
        self.length_V = np.array([len(piece) for piece in pieces], np.int32)
        self.symbol_VK = np.full((len(pieces), int(self.length_V.max()) + 1), -1, np.int32)
        for row_K, piece in zip(self.symbol_VK, pieces):
            row_K[: len(piece)] = list(piece)


class _Open:
    """Covers that share all tokens but the last: they agree with the text so far."""

    def __init__(self, ids: Ids, token_A: np.ndarray, mass_A: np.ndarray):
        self.ids, self.token_A, self.mass_A = ids, token_A, mass_A
        self.depth = 0
        """number of symbols of the last token that are part of the text"""


class Covers:
    """The covers of a growing text.

    `waiting` holds sequences of which the log-probabilities of the next token are needed: give them
    to `feed`, in this order, before `log_probs`. allowed: function from a sequence to the mask (V,)
    of the tokens that may follow; its symbols are those of `pieces`.
    """

    def __init__(self, pieces: Pieces, allowed: Callable[[Ids], np.ndarray], begin: Ids = ()):
        """begin: tokens before the text, such as BOS."""
        self._pieces, self._allowed, self._begin = pieces, allowed, len(begin)
        self._open: list[_Open] = []
        self._new = [(tuple(begin), 0.0)]

    @property
    def waiting(self) -> list[Ids]:
        return [ids for ids, _ in self._new]

    def feed(self, log_probs: Sequence[np.ndarray]) -> None:
        """Take the log-probabilities (V,) of the token after each sequence of `waiting`."""
        for (ids, mass), log_prob_V in zip(self._new, log_probs, strict=True):
            (token_A,) = np.nonzero(self._allowed(ids[self._begin :]))
            mass_A = mass + np.asarray(log_prob_V, np.float64)[token_A]
            if len(token_A):
                self._open.append(_Open(ids, token_A, mass_A))
        self._new = []

    def log_probs(self) -> np.ndarray:
        """Log-probability of each next symbol, float64 (S,); -inf for symbols that cannot follow,
        and everywhere if no token can."""
        mass_S = np.full(self._pieces.num_symbols, -np.inf)
        for group in self._open:
            next_A = self._pieces.symbol_VK[group.token_A, group.depth]
            np.logaddexp.at(mass_S, next_A, group.mass_A)
        total = np.logaddexp.reduce(mass_S)
        return mass_S - total if np.isfinite(total) else mass_S

    def advance(self, symbol: int) -> None:
        """Add a symbol to the text."""
        kept, pieces = [], self._pieces
        for group in self._open:
            fits_A = pieces.symbol_VK[group.token_A, group.depth] == symbol
            token_A, mass_A = group.token_A[fits_A], group.mass_A[fits_A]
            group.depth += 1
            ended_A = pieces.length_V[token_A] == group.depth
            new = zip(token_A[ended_A].tolist(), mass_A[ended_A].tolist())
            self._new += [((*group.ids, token), mass) for token, mass in new]
            group.token_A, group.mass_A = token_A[~ended_A], mass_A[~ended_A]
            if len(group.token_A):
                kept.append(group)
        self._open = kept
