"""Packing as index arithmetic: row r of a stream of documents is a function of r.

The documents, each as BOS, its bytes, EOS (or only its bytes), form a stream of N tokens. Row r of
length L covers tokens [r (L-1), r (L-1) + L): neighbouring rows share one token, which is predicted
in the first row and is context at t = 0 of the second. So every token except the first of the
stream is predicted exactly once, and no state is carried between rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hnet.config import BOS_ID, EOS_ID
from hnet.data.documents import Documents


class Row(NamedTuple):
    """One packed row, each field of shape (L,)."""

    input_ids: np.ndarray
    """ids, int32: bytes 0 to 255 and the special tokens; 0 = padding"""
    segment_ids: np.ndarray
    """segment numbers, int32: 1, 2, ... for the documents of the row; 0 = padding, at the end of
    the last row"""
    loss_mask: np.ndarray
    """mask of the scored positions, bool: True where input_ids[t] is a raw byte whose predecessor
    in its document is at t - 1. An EOS target is at t if input_ids[t] is 255, loss_mask[t] is
    False and segment_ids[t] == segment_ids[t - 1]; no raw byte satisfies all three"""
    document_ids: np.ndarray
    """number of the document in the stream, int32; -1 = padding"""


class Stream:
    """The token stream of some documents; without documents it has no rows."""

    def __init__(self, documents: Documents, *, seq_len: int, bos_eos: bool):
        self.documents = documents
        self._seq_len = seq_len
        self._bos_eos = bos_eos
        bounds = np.zeros(len(documents) + 1, np.int64)
        np.cumsum(documents.length_D + 2 * bos_eos, out=bounds[1:])
        self._bounds = bounds  # number of tokens before each document, then the total
        self.num_tokens = int(bounds[-1])
        self.num_rows = -(-max(0, self.num_tokens - 1) // (seq_len - 1))

    @property
    def _starts_D(self) -> np.ndarray:
        return self._bounds[:-1]

    @property
    def _ends_D(self) -> np.ndarray:
        return self._bounds[1:]

    def row(self, r: int) -> Row:
        """Row r; rows from num_rows on contain only padding."""
        L = self._seq_len
        row = Row(
            input_ids=np.zeros(L, np.int32),
            segment_ids=np.zeros(L, np.int32),
            loss_mask=np.zeros(L, bool),
            document_ids=np.full(L, -1, np.int32),
        )
        start = r * (L - 1)
        for segment, (d, lo, hi) in enumerate(self._documents_of(r), 1):
            piece = slice(lo - start, hi - start)
            row.segment_ids[piece] = segment
            row.document_ids[piece] = d
            self._fill(row, d, start, lo, hi)
        row.loss_mask[0] = False
        return row

    def byte_ranges(self, r: int) -> Iterator[tuple[int, int, int, int]]:
        """The raw bytes of row r: (first position, document, first byte of it, byte after the last
        one) for each document."""
        start = r * (self._seq_len - 1)
        for d, lo, hi in self._documents_of(r):
            first_byte = int(self._starts_D[d]) + self._bos_eos
            from_, to = max(lo, first_byte), min(hi, int(self._ends_D[d]) - self._bos_eos)
            if from_ < to:
                yield from_ - start, d, from_ - first_byte, to - first_byte

    def _documents_of(self, r: int) -> Iterator[tuple[int, int, int]]:
        """(document, its first token, token after its last one) for each document of row r."""
        start = r * (self._seq_len - 1)
        stop = min(start + self._seq_len, self.num_tokens)
        if r >= self.num_rows:
            return
        first = int(np.searchsorted(self._ends_D, start, side="right"))
        last = int(np.searchsorted(self._starts_D, stop, side="left"))
        for d in range(first, last):
            yield d, max(start, int(self._starts_D[d])), min(stop, int(self._ends_D[d]))

    def _fill(self, row: Row, d: int, start: int, lo: int, hi: int) -> None:
        """Write tokens [lo, hi) of the stream, all of document d."""
        first_byte = int(self._starts_D[d]) + self._bos_eos
        end_byte = int(self._ends_D[d]) - self._bos_eos
        if lo < first_byte:
            row.input_ids[lo - start] = BOS_ID
        if hi > end_byte:
            row.input_ids[hi - 1 - start] = EOS_ID
        from_, to = max(lo, first_byte), min(hi, end_byte)
        if from_ < to:
            row.input_ids[from_ - start : to - start] = self.documents.read(
                d, from_ - first_byte, to - first_byte
            )
            scored_from = max(from_, first_byte + (not self._bos_eos))
            row.loss_mask[scored_from - start : to - start] = True

    def text_before(self, r: int) -> tuple[int, int]:
        """(document of the first token of row r, number of its bytes before that token).

        For a row of padding it is the last document.
        """
        start = r * (self._seq_len - 1)
        d = min(int(np.searchsorted(self._ends_D, start, side="right")), len(self.documents) - 1)
        offset = start - int(self._starts_D[d]) - self._bos_eos
        return d, min(max(offset, 0), int(self.documents.length_D[d]))

    def scored_bytes(self, r: int | np.ndarray) -> np.ndarray:
        """Number of scored bytes of row r (or of each row).

        For bytes this follows from the lengths of the documents; for tokens the rows are read.
        """
        if (bytes_V := getattr(self.documents, "bytes_V", None)) is not None:
            rows = [self.row(i) for i in np.ravel(r)]
            counts = [bytes_V[row.input_ids[row.loss_mask]].sum() for row in rows]
            return np.array(counts, np.int64).reshape(np.shape(r))
        start = np.asarray(r) * (self._seq_len - 1)
        stop = np.minimum(start + self._seq_len, self.num_tokens)
        return self._scored_before(stop) - self._scored_before(start + 1)

    def _scored_before(self, token: np.ndarray) -> np.ndarray:
        """Number of scored bytes among the first ``token`` tokens of the stream."""
        d = np.minimum(np.searchsorted(self._ends_D, token, side="right"), len(self.documents) - 1)
        scored = self.documents.length_D - (not self._bos_eos)
        inside = np.clip(token - self._starts_D[d] - 1, 0, scored[d])
        bytes_before = self._starts_D[d] - 2 * self._bos_eos * d
        return bytes_before - (not self._bos_eos) * d + inside
