"""Documents of sources, one after another, and parts of them."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hnet.data.config import DataConfig
from hnet.data.sources import Source
from hnet.data.tokens import TokenDocuments, read_vocabulary


@dataclass(frozen=True)
class Documents:
    """The D documents of one share of the mixture, in order."""

    name: str
    """the glob, or "all" if several globs are read as one"""
    sources: tuple[Source, ...]
    source_D: np.ndarray
    """index of the source, int32"""
    number_D: np.ndarray
    """number of the document in its source, int32"""
    start_D: np.ndarray
    """offset of the first byte in the store of the source, int64"""
    length_D: np.ndarray
    """number of bytes, int64, at least 1"""

    @property
    def num_bytes(self) -> int:
        return int(self.length_D.sum())

    def __len__(self) -> int:
        return len(self.length_D)

    def read(self, d: int, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of document d, uint8."""
        origin = int(self.start_D[d])
        return self.sources[self.source_D[d]].store.read(origin + start, origin + stop)

    def document_name(self, d: int) -> str:
        """File of document d; ``FILE:n`` if the file holds several."""
        return self.sources[self.source_D[d]].document_name(int(self.number_D[d]))


@dataclass(frozen=True)
class Part:
    """The training or the held-out text: one entry, or with weights one entry per source."""

    documents: tuple[Documents, ...]

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.documents)

    @property
    def globs(self) -> tuple[str, ...]:
        """Names of all sources, including those that are read as one entry."""
        return tuple(dict.fromkeys(s.name for d in self.documents for s in d.sources))

    @property
    def num_bytes(self) -> int:
        """Number of raw bytes, without special tokens."""
        return sum(d.num_bytes for d in self.documents)

    @cached_property
    def _first_ids(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.documents)])

    @property
    def num_documents(self) -> int:
        return int(self._first_ids[-1])

    def first_document(self, entry: int) -> int:
        """Number in this part of the first document of an entry of ``documents``."""
        return int(self._first_ids[entry])

    def document_name(self, document: int) -> str:
        """File of a document, by its number in this part; ``FILE:n`` if it holds several."""
        documents, d = self._find(document)
        return documents.document_name(d)

    def file_of(self, document: int) -> str:
        """File of a document, by its number in this part."""
        documents, d = self._find(document)
        return documents.sources[documents.source_D[d]].file_of(int(documents.number_D[d]))

    def glob_of(self, document: int) -> str:
        """Name of the source of a document, by its number in this part."""
        documents, d = self._find(document)
        return documents.sources[documents.source_D[d]].name

    def document_bytes(self, document: int) -> int:
        """Number of raw bytes of a document, by its number in this part."""
        documents, d = self._find(document)
        return int(documents.length_D[d])

    def texts(self) -> Iterator[bytes]:
        """Yield the raw bytes of each document, in the order of their numbers."""
        for documents in self.documents:
            for d, length in enumerate(documents.length_D):
                yield documents.read(d, 0, int(length)).tobytes()

    def beginning(self, most: int) -> list[bytes]:
        """The first documents, at most `most` bytes in total; the last one may be truncated, at the
        start of a character."""
        found = []
        for document in range(self.num_documents):
            if most <= 0:
                break
            text = self.begin(document, most)
            decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
            decoder.decode(text)
            if unfinished := decoder.getstate()[0]:
                text = text[: -len(unfinished)]
            found.append(text)
            most -= self.document_bytes(document)
        return found

    def begin(self, document: int, most: int) -> bytes:
        """The first bytes of a document, at most `most`, by its number in this part."""
        return self.read(document, 0, most)

    def read(self, document: int, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a document, up to its end, by its number in this part."""
        documents, d = self._find(document)
        return documents.read(d, start, min(stop, int(documents.length_D[d]))).tobytes()

    def tokens(self, tokenizer: str) -> tuple[TokenDocuments, ...]:
        """The documents as tokens, computed once. Raises ConfigError as `Vocabulary` does."""
        if tokenizer not in self._tokens:
            vocabulary = read_vocabulary(tokenizer)
            self._tokens[tokenizer] = tuple(
                TokenDocuments(documents, vocabulary) for documents in self.documents
            )
        return self._tokens[tokenizer]

    @cached_property
    def _tokens(self) -> dict[str, tuple[TokenDocuments, ...]]:
        return {}

    def unscored_bytes(self, config: DataConfig) -> int:
        """Number of bytes that no position predicts: without BOS, the first of each document."""
        return 0 if config.bos_eos else self.num_documents

    def _find(self, document: int) -> tuple[Documents, int]:
        entry = int(np.searchsorted(self._first_ids, document, side="right")) - 1
        return self.documents[entry], document - self.first_document(entry)
