"""Boundary labels of bytes from the cuts of a tokenizer, for a loss with labels="given".

As in dynamic token pooling (arXiv 2211.09761, section 3.3), words are cut one by one: each byte of
white space is a boundary, and so is the last byte of each piece of a word except its last piece,
which ends with the white space after it. The code of the paper shifts the cuts inside the first
word of a row by one character; this one does not.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from hnet.data.documents import Part
from hnet.data.packing import Stream
from hnet.errors import ConfigError

UNIGRAM = "unigram:"
"""beginning of `data.labels` for a unigram model trained on the text of the run"""
_SAMPLE = 1 << 21  # bytes of text that a unigram model is trained on
_MARGIN = 256  # bytes around a row in which the whole word at its edge is looked for
_CACHED = 1 << 16  # words
_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))


def library_problem(field: str) -> ConfigError:
    return ConfigError(
        f"{field}: the library tokenizers is not installed: pip install 'hnet-jax[bpe]'"
    )


def unigram_size(labels: str) -> int | None:
    """N of "unigram:N", the number of pieces; None if `labels` is a file.

    Raises ConfigError if N is no number from 2 on.
    """
    if not labels.startswith(UNIGRAM):
        return None
    size = labels.removeprefix(UNIGRAM)
    if not (size.isascii() and size.isdigit() and 2 <= int(size) < 10**7):
        raise ConfigError(f"data.labels={labels!r}: use e.g. 'unigram:10000', or a tokenizer.json")
    return int(size)


class Cuts:
    """Cuts of a `tokenizers.Tokenizer` inside words."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[bytes, tuple[int, ...]] = {}

    def __call__(self, text: bytes) -> np.ndarray:
        """Boundary of each byte of a text that begins where a word begins, bool."""
        found = _SPACE[np.frombuffer(text, np.uint8)]
        for word in re.finditer(rb"[^ \t\n\r\v\f]+", text):
            found[[word.start() + end - 1 for end in self._ends(word[0])]] = True
        return found

    def _ends(self, word: bytes) -> tuple[int, ...]:
        """Number of bytes of a word before each cut inside it."""
        if (ends := self._known.get(word)) is None:
            characters = word.decode(errors="replace")
            pieces = self._tokenizer.encode(characters, add_special_tokens=False).offsets
            inner = sorted({end for _, end in pieces if 0 < end < len(characters)})
            ends = tuple(len(characters[:end].encode()) for end in inner)
            if "\ufffd" in characters:  # not UTF-8: its characters have other lengths
                ends = ()
            if len(self._known) >= _CACHED:
                self._known.clear()
            self._known[word] = ends
        return ends


def open_cuts(labels: str, train: Part) -> Cuts:
    """The cuts of a tokenizer.json, or of a unigram model trained on the text of a run.

    Raises ConfigError, in one line, if there is no such file or library.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise library_problem(f"data.labels={labels!r}") from None
    size = unigram_size(labels)
    if size is not None:
        return Cuts(unigram(_sample(train), size))
    try:
        return Cuts(Tokenizer.from_file(labels))
    except Exception as e:  # the library raises nothing more specific
        raise ConfigError(f"data.labels={labels!r} cannot be read: {e}") from None


def unigram(texts: Iterable[str], size: int):
    """A unigram model (arXiv 1804.10959) of at most `size` pieces of the words of some texts.

    The same texts give the same model: the library adds up its counts in one thread.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        tokenizer.train_from_iterator(texts, trainer)
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
    return tokenizer


def _sample(part: Part) -> Iterator[str]:
    """The first bytes of a text, an equal share from each source."""
    share = _SAMPLE // len(part.documents)
    for documents in part.documents:
        left = share
        for d, length in enumerate(documents.length_D):
            text = documents.read(d, 0, min(int(length), left)).tobytes()
            yield text.decode(errors="ignore")
            left -= len(text)
            if left <= 0:
                break


class RowLabels:
    """Labels for the rows of some streams of bytes."""

    def __init__(self, streams: Sequence[Stream], cuts: Cuts):
        self._streams, self._cuts = streams, cuts

    def __call__(self, places: Sequence[tuple[int, int]], row_len: int) -> np.ndarray:
        """Boundary labels, bool (rows, L). places: (stream, row number) of each row.

        BOS, EOS and padding have none. A word at the edge of a row is cut as a whole if the row
        has at most 256 bytes less of it.
        """
        found_BL = np.zeros((len(places), row_len), bool)
        for found_L, (stream, r) in zip(found_BL, places):
            for at, d, start, stop in self._streams[stream].byte_ranges(r):
                found_L[at : at + stop - start] = self._of(stream, d, start, stop)
        return found_BL

    def _of(self, stream: int, d: int, start: int, stop: int) -> np.ndarray:
        """Labels of bytes [start, stop) of document d."""
        documents = self._streams[stream].documents
        first = max(0, start - _MARGIN)
        end = min(int(documents.length_D[d]), stop + _MARGIN)
        bytes_ = documents.read(d, first, end)
        spaces = np.flatnonzero(_SPACE[bytes_])
        before, after = spaces[spaces < start - first], spaces[spaces >= stop - first]
        lo = int(before[-1]) + 1 if len(before) else 0
        hi = int(after[0]) if len(after) else len(bytes_)
        found = np.zeros(len(bytes_), bool)
        found[lo:hi] = self._cuts(bytes_[lo:hi].tobytes())
        return found[start - first : stop - first]
