"""LiB, "Less is Better" (Yang et al. 2020, github.com/ray306/LiB): chunks from a simulated reader.

A list of chunks is kept in order of priority while texts are read with greedy longest matches.
Neighbours are proposed as a new chunk at random, and memorised when proposed twice in a batch of
texts. Whenever a shorter match existed too, the text is read with both: the longer one moves up the
list if it gave fewer unknown bytes or chunks, else down, and out of it at the end. Chunks are of
bytes here, which are the first chunks in memory; the original reads characters. The list is
truncated to the wanted size, and a text is encoded with greedy longest matches.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence

LONGEST = 12
"""maximum number of bytes per chunk"""
PROPOSED = 0.25  # share of neighbours that are proposed
GAP = 2  # longest run of unknown bytes that is proposed
MOVED = 0.2  # share of the rank by which a chunk moves
TESTED = 1e-4  # share of the list at its end whose chunks must be used to stay
LIFE = 10  # batches that such a chunk has
BATCH = 200  # texts
ROUNDS = 3  # times that all texts are read
READ_BYTES = 1 << 17  # bytes of the texts that are read
FORMAT = "hnet longest match"


def train_lib(texts: Sequence[bytes], vocab_size: int) -> str:
    """Content of the file of a vocabulary: the 256 bytes and up to `vocab_size` - 256 chunks."""
    text = b"".join(texts)[:READ_BYTES]
    reader, lines = Reader(text), text.splitlines(keepends=True)
    for _ in range(ROUNDS):
        reader.rng.shuffle(lines)
        for first in range(0, len(lines), BATCH):
            reader.read(lines[first : first + BATCH])
    kept = [chunk for chunk in reader.chunks if len(chunk) > 1][: vocab_size - 256]
    return json.dumps({"format": FORMAT, "tokens": [chunk.hex() for chunk in kept]})


class Reader:
    """Memory of chunks, in order of priority, and how it changes by reading."""

    def __init__(self, known: bytes = b"", seed: int = 0):
        """known: bytes that are memorised at first, in the order of their frequency."""
        self.rng = random.Random(seed)
        self.chunks = [bytes([byte]) for byte, _ in Counter(known).most_common()]
        self._known = set(self.chunks)
        self._life: dict[bytes, int] = {}

    def read(self, texts: Sequence[bytes]) -> None:
        """Read a batch of texts, then memorise, move and forget chunks."""
        proposed, votes, used = Counter(), Counter(), set()
        rank = {chunk: i for i, chunk in enumerate(self.chunks)}
        for text in texts:
            at, before = 0, b""
            while at < len(text):
                longest, second = self.matches(text, at)
                if not longest:
                    end = at + 1
                    while end < len(text) and not self.matches(text, end)[0]:
                        end += 1
                    if end - at <= GAP:
                        proposed[text[at:end]] += 1
                    at, before = end, b""
                    continue
                used.add(longest)
                if second:
                    is_worse = self._is_worse(text, at, (longest, second), rank)
                    votes[longest] += -1 if is_worse else 1
                joined = before + longest
                if before and len(joined) <= LONGEST and self.rng.random() < PROPOSED:
                    proposed[joined] += 1
                at, before = at + len(longest), longest
        self._move(votes, rank)
        self._forget(used)
        for chunk, count in proposed.items():
            if count >= 2 and chunk not in self._known:
                self.chunks.append(chunk)
                self._known.add(chunk)

    def matches(self, text: bytes, at: int) -> tuple[bytes, bytes]:
        """The longest and the second-longest known chunk at an offset; b"" for none."""
        found = []
        for length in range(min(LONGEST, len(text) - at), 0, -1):
            if (chunk := text[at : at + length]) in self._known:
                found.append(chunk)
                if len(found) == 2:
                    break
        return tuple([*found, b"", b""][:2])

    def _is_worse(self, text: bytes, at: int, pair: tuple[bytes, bytes], rank: dict) -> bool:
        """Whether reading on from the first chunk of a pair costs more than from the second.

        Costs are unknown bytes, then chunks, then the sum of their ranks, up to where both readings
        end at the same byte.
        """
        ends = [at + len(chunk) for chunk in pair]
        costs = [[0, 1, rank.get(chunk, len(rank))] for chunk in pair]
        while ends[0] != ends[1]:
            shorter = int(ends[1] < ends[0])
            chunk, _ = self.matches(text, ends[shorter])
            new = (not chunk, 1, rank.get(chunk, len(rank)))
            costs[shorter] = [old + more for old, more in zip(costs[shorter], new)]
            ends[shorter] += len(chunk) or 1
        return costs[0] > costs[1]

    def _move(self, votes: Counter, rank: dict[bytes, int]) -> None:
        """Chunks with more votes for than against move to the front, the others to the end."""
        size = len(self.chunks)
        place = {}
        for chunk, index in rank.items():
            step = int(index * MOVED) + 1.5  # past the chunk that is there
            vote = votes.get(chunk, 0)
            place[chunk] = index + (step if vote < 0 else -step if vote > 0 else 0)
        self.chunks = sorted((c for c in self.chunks if place[c] < size), key=place.__getitem__)
        self._known = set(self.chunks)

    def _forget(self, used: set[bytes]) -> None:
        """Chunks at the end of the list that are not used for some batches are dropped."""
        last = self.chunks[len(self.chunks) - max(1, int(len(self.chunks) * TESTED)) :]
        self._life = {c: self._life.get(c, LIFE) - (c not in used) for c in last}
        gone = {chunk for chunk, life in self._life.items() if life <= 0}
        self.chunks = [chunk for chunk in self.chunks if chunk not in gone]
        self._known -= gone
