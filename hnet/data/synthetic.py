"""Seeded text whose true boundaries or true entropy are known, for tests and smoke runs.

``synthesize`` draws morphemes, builds words from them and writes text whose words have Zipf
frequencies, in an alphabet of 1 to 4 bytes per character. It returns the offsets at which words
and morphemes begin. ``MarkovSource`` is a Markov chain over byte values with an exact entropy rate
and an exact log probability of every byte, so that bits per byte can be checked to the last digit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hnet.errors import ConfigError

PREFIX = "synthetic:"
"""prefix of the entries ``synthetic:SCRIPT`` and ``synthetic:SCRIPT:BYTES`` of ``data.files``"""

_DEFAULT_BYTES = 1_000_000
_DOCUMENT_BYTES = 4_000
_NUM_WORDS = 1_000
_NUM_MORPHEMES = 200


@dataclass(frozen=True)
class Script:
    """An alphabet, the word separator and the lengths of morphemes."""

    alphabet: str
    separator: str = " "
    morpheme_len: tuple[int, int] = (2, 5)
    """minimum and maximum number of characters per morpheme"""


def _letters(first: int, count: int) -> str:
    return "".join(map(chr, range(first, first + count)))


SCRIPTS: dict[str, Script] = {
    "latin": Script(_letters(0x61, 26)),
    "greek": Script(_letters(0x3B1, 25)),
    "cyrillic": Script(_letters(0x430, 32)),
    "devanagari": Script(_letters(0x915, 37)),
    "han": Script(_letters(0x4E00, 400), separator="", morpheme_len=(1, 2)),
    "deseret": Script(_letters(0x10428, 40)),
    "dna": Script("ACGT", separator="", morpheme_len=(6, 12)),
}
"""name -> script; bytes per character: 1 (latin, dna), 2 (greek, cyrillic), 3 (devanagari, han) or
4 (deseret)"""


@dataclass(frozen=True)
class SyntheticText:
    """Text with its true boundaries as byte offsets; each array begins with 0."""

    data: bytes
    word_starts: np.ndarray
    """offsets of words, int64; a separator belongs to the word before it"""
    morpheme_starts: np.ndarray
    """offsets of morphemes, int64; contains word_starts"""


def synthesize(script: str, num_bytes: int, *, seed: int = 0) -> SyntheticText:
    """Return at least ``num_bytes`` bytes of text, ending with a whole word.

    The words of the language depend only on the script, the text also on the seed. So texts with
    different seeds can serve as training and held-out text. Raises ConfigError for an unknown
    script.
    """
    if script not in SCRIPTS:
        raise ConfigError(
            f"synthetic script {script!r} is unknown: use one of {', '.join(SCRIPTS)}"
        )
    words, separator = _lexicon(script), SCRIPTS[script].separator.encode()
    rank = np.arange(1, _NUM_WORDS + 1)
    frequency = (1 / rank) / (1 / rank).sum()
    rng = np.random.default_rng((seed, 1))
    data, word_starts, morpheme_starts = bytearray(), [], []
    while len(data) < num_bytes:
        for w in rng.choice(_NUM_WORDS, size=256, p=frequency):
            if len(data) >= num_bytes:
                break
            word_starts.append(len(data))
            for morpheme in words[w]:
                morpheme_starts.append(len(data))
                data += morpheme
            data += separator
    return SyntheticText(
        bytes(data), np.array(word_starts, np.int64), np.array(morpheme_starts, np.int64)
    )


@lru_cache
def _lexicon(script: str) -> list[list[bytes]]:
    """Words as lists of UTF-8 morphemes, most frequent first: those with fewer morphemes."""
    kind = SCRIPTS[script]
    rng = np.random.default_rng((list(SCRIPTS).index(script), 0))
    least, most = kind.morpheme_len

    def morpheme() -> bytes:
        picks = rng.integers(len(kind.alphabet), size=rng.integers(least, most + 1))
        return "".join(kind.alphabet[i] for i in picks).encode()

    morphemes = [morpheme() for _ in range(_NUM_MORPHEMES)]
    counts = rng.integers(1, 4, size=_NUM_WORDS)
    words = [[morphemes[i] for i in rng.integers(_NUM_MORPHEMES, size=n)] for n in counts]
    return sorted(words, key=len)


@lru_cache(maxsize=1024)  # 4 MB
def _document(script: str, num_bytes: int, seed: int) -> bytes:
    return synthesize(script, num_bytes, seed=seed).data


def documents(name: str) -> Iterator[tuple[str, bytes]]:
    """Yield (name, text) for each document of the corpus ``synthetic:SCRIPT[:BYTES]``."""
    script, _, size = name.removeprefix(PREFIX).partition(":")
    if size and not (size.isdecimal() and int(size)):
        raise ConfigError(f"data.files: {name!r} has no size: write synthetic:SCRIPT[:BYTES]")
    left, number = int(size or _DEFAULT_BYTES), 0
    while left > 0:
        text = _document(script, min(left, _DOCUMENT_BYTES), number)
        yield f"{PREFIX}{script}.{number:06}", text
        left -= len(text)
        number += 1


class MarkovSource:
    """First-order Markov chain over ``num_symbols`` byte values with dyadic probabilities.

    From state i the chain moves to (i + 1) % n, (i + 2) % n, ... with probabilities 1/2, 1/4, ...,
    the last one doubled. All rows of the transition matrix are permutations of one distribution and
    the stationary distribution is uniform, so the entropy rate is exactly 2 - 2^(2-n) bits per
    byte.
    """

    def __init__(self, num_symbols: int = 4, first_byte: int = ord("a")):
        self.first_byte = first_byte
        steps = 0.5 ** np.arange(1, num_symbols + 1)
        steps[-1] *= 2
        self._steps = steps

    @property
    def entropy(self) -> float:
        """Entropy rate: bits per byte, given the byte before."""
        return float(-(self._steps * np.log2(self._steps)).sum())

    def sample(self, num_bytes: int, *, seed: int) -> bytes:
        """Draw ``num_bytes`` bytes, the first one uniformly."""
        rng, n = np.random.default_rng(seed), len(self._steps)
        moves = rng.choice(n, size=num_bytes, p=self._steps) + 1
        if num_bytes:
            moves[0] = rng.integers(n)
        return (np.cumsum(moves) % n + self.first_byte).astype(np.uint8).tobytes()

    def log2_prob(self, data: bytes) -> np.ndarray:
        """log2 P(byte | byte before), float64 (len(data),); the first byte is uniform."""
        n = len(self._steps)
        symbols = np.frombuffer(data, np.uint8).astype(np.int64) - self.first_byte
        moves = (np.diff(symbols) - 1) % n
        return np.concatenate([[-np.log2(n)], np.log2(self._steps[moves])])[: len(data)]

    def log2_transitions(self) -> np.ndarray:
        """log2 P(next | current), float64 (256, 256), -inf for impossible transitions."""
        n, first = len(self._steps), self.first_byte
        table = np.full((256, 256), -np.inf)
        for i in range(n):
            for move in range(n):
                table[first + i, first + (i + move + 1) % n] = np.log2(self._steps[move])
        return table
