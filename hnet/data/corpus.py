"""A corpus: the text of a run, divided into a training and a held-out part."""

import hashlib
import os
from dataclasses import dataclass, replace

import numpy as np

from hnet.data import files, pythondocs
from hnet.data.config import DataConfig
from hnet.data.documents import Documents, Part
from hnet.data.sources import Source, is_built_in, open_source
from hnet.errors import ConfigError, shown


@dataclass(frozen=True)
class Corpus:
    """The text of a run."""

    train: Part
    heldout: Part
    fingerprint: str
    """hash of all bytes, the document boundaries and the division; file names do not matter"""

    @property
    def num_bytes(self) -> int:
        """Number of raw bytes of both parts."""
        return self.train.num_bytes + self.heldout.num_bytes


def open_corpus(config: DataConfig) -> Corpus:
    """Open the files of a configuration and divide them into training and held-out text.

    The held-out text is what ``eval_files`` match. If ``eval_files`` is empty, it is
    ``eval_fraction`` of the text (with weights, of each source), at most ``eval_max_bytes`` in
    total: whole documents in the order of a hash of their file name and number; the last one is
    split and its end is held out. Hence the division does not depend on the folder of the files,
    and a single file is divided too.

    Raises ConfigError, in one line, for files that are missing, empty, unreadable or too short to
    fill a row.
    """
    patterns = config.files or (pythondocs.NAME,)
    heldout_texts = _texts(config.eval_files, "data.eval_files")
    _check_distinct(patterns, heldout_texts)
    sources = [open_source(p, leave_out=heldout_texts) for p in patterns]
    whole = _whole(sources, mixed=bool(config.weights))
    if not whole.num_bytes:
        raise ConfigError(
            f"data.files={shown(config.files)}: the corpus is empty; give files with text"
        )
    if config.eval_files:
        train, heldout = whole, open_part(config.eval_files, field="data.eval_files")
    else:
        share = min(config.eval_fraction, config.eval_max_bytes / whole.num_bytes)
        train, heldout = _divide(whole, share)
    for documents in train.documents:
        _check_fills_a_row(documents, config)
    return Corpus(train, heldout, _fingerprint(train, heldout))


def open_part(patterns: tuple[str, ...], *, field: str = "data.files") -> Part:
    """Open files as one undivided part for evaluation.

    Raises ConfigError when files are missing, unreadable, named twice or empty.
    """
    _texts(patterns, field)
    part = _whole([open_source(p, field=field) for p in patterns], mixed=False)
    if not part.num_bytes:
        raise ConfigError(f"{field}={shown(patterns)} holds no byte: give files with text")
    return part


def _texts(patterns: tuple[str, ...], field: str) -> dict[str, str]:
    """Map the real path of each matching file, or the name of built-in text, to its glob."""
    found: dict[str, str] = {}
    for pattern in patterns:
        if is_built_in(pattern):
            texts = [":".join(pattern.split(":")[:2])]
        else:
            texts = map(os.path.realpath, files.expand(pattern, field))
        for text in texts:
            if text in found:
                raise ConfigError(
                    f"{field}: {text!r} is matched by {found[text]!r} and by {pattern!r}: "
                    "name each text once (data.weights makes a source count more)"
                )
            found[text] = pattern
    return found


def _check_distinct(patterns: tuple[str, ...], heldout_texts: dict[str, str]) -> None:
    for text, pattern in _texts(patterns, "data.files").items():
        if is_built_in(text) and text in heldout_texts:
            raise ConfigError(
                f"data.eval_files: {heldout_texts[text]!r} is trained on by {pattern!r}: "
                "hold out another text, or leave data.eval_files empty"
            )


def _check_fills_a_row(documents: Documents, config: DataConfig) -> None:
    special = 2 * len(documents) if config.bos_eos else 0
    if documents.num_bytes + special < config.seq_len:
        raise ConfigError(
            f"data.files: {documents.name!r} leaves {documents.num_bytes} bytes to train "
            f"on, less than a row of data.seq_len={config.seq_len}: give more text"
        )


def _whole(sources: list[Source], mixed: bool) -> Part:
    if mixed:
        return Part(tuple(_documents(s.name, (s,)) for s in sources))
    name = sources[0].name if len(sources) == 1 else "all"
    return Part((_documents(name, tuple(sources)),))


def _documents(name: str, sources: tuple[Source, ...]) -> Documents:
    counts = [len(s.lengths_D) for s in sources]
    return Documents(
        name=name,
        sources=sources,
        source_D=np.repeat(np.arange(len(sources), dtype=np.int32), counts),
        number_D=np.concatenate([np.arange(n, dtype=np.int32) for n in counts]),
        start_D=np.concatenate([np.cumsum(s.lengths_D) - s.lengths_D for s in sources]),
        length_D=np.concatenate([s.lengths_D for s in sources]),
    )


def _divide(whole: Part, share: float) -> tuple[Part, Part]:
    """Hold out ``share`` of the bytes of each entry; at least one byte unless share is 0."""
    pairs = [_divide_documents(d, share) for d in whole.documents]
    return Part(tuple(p[0] for p in pairs)), Part(tuple(p[1] for p in pairs))


def _divide_documents(documents: Documents, share: float) -> tuple[Documents, Documents]:
    wanted = max(1, int(share * documents.num_bytes)) if share and documents.num_bytes else 0
    if not wanted:
        return documents, _select(documents, np.zeros(0, np.int64))
    by_hash = np.argsort(np.concatenate([s.keys_D() for s in documents.sources]), kind="stable")
    taken_H = np.cumsum(documents.length_D[by_hash])
    held = by_hash[: np.searchsorted(taken_H, wanted) + 1]
    excess, last = int(taken_H[len(held) - 1]) - wanted, int(held[-1])
    kept = _next_character(documents, last, excess)  # training bytes of the last document
    held, trained_D = np.sort(held), np.ones(len(documents), bool)
    trained_D[held] = False
    trained_D[last] = kept > 0
    train, heldout = _select(documents, trained_D), _select(documents, held)
    if kept:
        train.length_D[np.count_nonzero(trained_D[:last])] = kept
        i = np.searchsorted(held, last)
        heldout.start_D[i] += kept
        heldout.length_D[i] -= kept
    return train, heldout


def _next_character(documents: Documents, d: int, offset: int) -> int:
    """An offset near `offset` that does not split a UTF-8 character of document d.

    Later offsets are tried first.
    """
    for step in (0, 1, 2, 3, -1, -2, -3):
        if 0 <= offset + step < documents.length_D[d]:
            (byte,) = documents.read(d, offset + step, offset + step + 1)
            if byte & 0xC0 != 0x80:
                return offset + step
    return offset  # not UTF-8


def _select(documents: Documents, which: np.ndarray) -> Documents:
    columns = ("source_D", "number_D", "start_D", "length_D")
    return replace(documents, **{name: getattr(documents, name)[which] for name in columns})


def _fingerprint(*parts: Part) -> str:
    """Hash of the text of each entry and its division; independent of file names and grouping."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        for documents in part.documents:
            for source in documents.sources:
                digest.update(source.digests)
            counts = [len(s.lengths_D) for s in documents.sources]
            before_S, starts = np.cumsum([0, *counts[:-1]]), np.zeros(len(documents), np.int64)
            for i, source in enumerate(documents.sources):
                own = documents.source_D == i
                begins = np.cumsum(source.lengths_D) - source.lengths_D
                starts[own] = documents.start_D[own] - begins[documents.number_D[own]]
            digest.update((documents.number_D + before_S[documents.source_D]).tobytes())
            digest.update(starts.tobytes())
            digest.update(documents.length_D.tobytes())
    return digest.hexdigest()
