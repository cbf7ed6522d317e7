"""Which tokens may follow: a sequence of tokens is canonical if it is what the tokenizer makes of
its own bytes. A model that was trained on a tokenizer's output knows canonical sequences only.
"""

import codecs
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from hnet.config import EOS_ID
from hnet.data.tokens import LongestMatch, Vocabulary
from hnet.errors import ConfigError

_CACHED = 1 << 13  # masks
_WORD = re.compile(r"(?<=\S)(?= )")  # where the pre-tokenization of GPT-2 always splits


class Canonical:
    """Masks of the tokens that keep a sequence canonical.

    Only the end of the sequence is encoded again for each token: with the pre-tokenization of GPT-2
    from the last word on; with a BPE without pre-tokenization the last token, since such a sequence
    is canonical if each pair of neighbours is; with longest matches the last bytes; otherwise all.
    """

    def __init__(self, vocabulary: Vocabulary | LongestMatch, *, eos: bool):
        """eos: whether EOS may end a text. Raises ConfigError for tokenizers without such masks."""
        self._vocabulary, self._eos = vocabulary, eos
        self._known: dict[tuple[int, ...], np.ndarray] = {}
        self._longest = None
        if isinstance(vocabulary, LongestMatch):
            self._longest = vocabulary.longest
            order = sorted(range(vocabulary.size), key=vocabulary.pieces.__getitem__)
            self._sorted, self._order_V = [vocabulary.pieces[i] for i in order], np.array(order)
            return
        settings, path = vocabulary.settings(), vocabulary.path
        model, before = settings["model"], settings.get("pre_tokenizer") or {}
        if problem := _problem(settings):
            raise ConfigError(
                f"data.tokenizer={path!r} {problem}: probabilities of bytes need a byte-level BPE "
                "or unigram model that splits a text in one way"
            )
        plain = before.get("type") == "ByteLevel"
        self._in_words = plain and before.get("use_regex", True)
        is_bpe = model["type"] == "BPE" and not model.get("ignore_merges")
        self._in_pairs = plain and not self._in_words and is_bpe

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """Mask bool (V,) of the tokens that may follow the canonical sequence `ids`."""
        end = self._end(tuple(ids))
        if (found := self._known.get(end)) is None:
            if len(self._known) >= _CACHED:
                self._known.clear()
            found = self._known[end] = self._mask(end)
        return found

    def _mask(self, end: tuple[int, ...]) -> np.ndarray:
        vocabulary = self._vocabulary
        data = b"".join(vocabulary.pieces[i] for i in end)
        if self._longest:
            found_V = self._mask_of_matches(end, data)
        else:
            found_V = np.array([
                (*end, i) in vocabulary.encode_beginning(data + piece)
                for i, piece in enumerate(vocabulary.pieces)
            ])  # fmt: skip
        found_V[EOS_ID] = self._eos and _is_whole(data)
        return found_V

    def _mask_of_matches(self, end: tuple[int, ...], data: bytes) -> np.ndarray:
        """Mask of the tokens with which no token of the end would have had a longer match."""
        found_V, start = np.ones(self._vocabulary.size, bool), 0
        for i in end:
            for longer in self._sorted[self._beginning_with(data[start:])]:
                if rest := longer[len(data) - start :]:
                    found_V[self._order_V[self._beginning_with(rest)]] = False
            start += len(self._vocabulary.pieces[i])
        return found_V

    def _beginning_with(self, prefix: bytes) -> slice:
        """The sorted pieces that begin with these bytes."""
        last = prefix + b"\xff" * self._longest
        return slice(bisect_left(self._sorted, prefix), bisect_right(self._sorted, last))

    def _end(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The last tokens of a sequence, which decide about the next one."""
        pieces = self._vocabulary.pieces
        if self._longest:
            first, size = len(ids), 0
            while first > 0 and size < self._longest - 1:
                first -= 1
                size += len(pieces[ids[first]])
            return ids[first:]
        if self._in_pairs:
            begins = [k for k in range(len(ids)) if not _continues(pieces[ids[k]])]
            return ids[begins[-1] if begins else 0 :]
        if not self._in_words:
            return ids
        text = b"".join(pieces[i] for i in ids).decode(errors="surrogateescape")
        starts = [found.start() for found in _WORD.finditer(text)]
        if not starts:
            return ids
        left = len(text[starts[-1] :].encode(errors="surrogateescape"))
        first = len(ids)
        while left > 0:
            first -= 1
            left -= len(pieces[ids[first]])
        return ids[first:]


def _problem(settings: dict[str, Any]) -> str:
    """Why sequences cannot be checked; empty if they can."""
    before, model = settings.get("pre_tokenizer") or {}, settings["model"]
    if settings.get("normalizer"):
        return "has a normalizer"
    if "ByteLevel" not in [before.get("type"), *_types(before)]:
        return "does not encode bytes"
    if model["type"] not in ("BPE", "Unigram"):
        return f"is a {model['type']} model"
    return "drops merges at random" if model.get("dropout") else ""


def _types(before: dict[str, Any]) -> list[str]:
    return [part.get("type") for part in before.get("pretokenizers", ())]


def _continues(piece: bytes) -> bool:
    """Whether a token begins inside a character."""
    return piece[0] & 0xC0 == 0x80


def _is_whole(data: bytes) -> bool:
    """Whether the last character is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
    decoder.decode(data)
    return not decoder.getstate()[0]
