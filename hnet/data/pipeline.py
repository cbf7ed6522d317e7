"""Batches by number: each process builds its rows of batch k from (config, corpus, seed, k).

So the position of a run is one integer, which does not depend on the number of processes and
workers. Grain permutes the rows (a bijection that is computed per index, without a stored
permutation) and builds batches ahead. Its elements are whole batches, so no step of the pipeline
can drop or reorder rows.
"""

import multiprocessing
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hnet.data.config import DataConfig
from hnet.data.corpus import Corpus
from hnet.data.documents import Part
from hnet.data.labels import RowLabels, open_cuts
from hnet.data.packing import Stream
from hnet.data.row_order import RowOrder
from hnet.data.row_routes import RowRoutes
from hnet.data.scripts import of_whole_characters
from hnet.data.stores import Shared
from hnet.errors import ConfigError

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
RouteGroups = Sequence[Sequence[str]]


class _TrainBatches:
    """Random access to this process's rows of the batches of a run (a Grain data source)."""

    def __init__(
        self,
        part: Part,
        config: DataConfig,
        groups: RouteGroups,
        seed: int,
        process: tuple[int, int],
        tells_sources: bool,
    ):
        self._streams = _streams(part, config)
        self._sources = _source_ids(part) if tells_sources else None
        self._scripts = None
        if tells_sources and not config.tokenizer:
            self._scripts = RowRoutes(self._streams)
        self._routes = _row_routes(self._streams, groups, config)
        self._labels = None
        if config.labels:
            self._labels = RowLabels(self._streams, open_cuts(config.labels, part))
        self._order = RowOrder([s.num_rows for s in self._streams], config.weights, seed)
        self._batch_size = config.batch_size
        self._rows = _rows_of_process(config, *process)
        self._shared = Shared(dict(vars(self))) if config.num_workers else None

    def __reduce__(self) -> tuple:
        """Pickle a key only: a worker maps the arrays of the process that opened the corpus."""
        return _in_worker, (self._shared.key,)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> Batch:
        slots = [k * self._batch_size + i for i in self._rows]
        places = [self._order(slot) for slot in slots]
        names = ("input_ids", "segment_ids", "loss_mask")
        batch = _batch(self._streams, places, names, self._routes)
        if self._labels is not None:
            batch["labels"] = self._labels(places, batch["input_ids"].shape[1])
        if self._sources is not None:
            batch |= self._told_apart(places)
        return batch

    def _told_apart(self, places: list[tuple[int, int]]) -> Batch:
        """Source and, of bytes, script of each token, int32 (rows, L)."""
        rows = [self._streams[stream].row(row) for stream, row in places]
        documents_BL = np.stack([row.document_ids for row in rows])
        of_rows = [self._sources[stream] for stream, _ in places]
        sources = [own[np.maximum(d, 0)] for own, d in zip(of_rows, documents_BL)]
        found = {"source_ids": np.stack(sources)}
        if self._scripts is not None:
            ids_BL = np.stack([row.input_ids for row in rows])
            script_BL = self._scripts.scripts(places, rows)
            script_BL = of_whole_characters(script_BL, ids_BL, documents_BL)
            found["script_ids"] = script_BL.astype(np.int32)
        return found

    def source_bytes(self, k: int) -> np.ndarray:
        """Number of scored bytes per stream in batch k over all processes, int64 (S,)."""
        counts_S = np.zeros(len(self._streams), np.int64)
        for slot in range(k * self._batch_size, (k + 1) * self._batch_size):
            stream, row = self._order(slot)
            counts_S[stream] += self._streams[stream].scored_bytes(row)
        return counts_S


def _source_ids(part: Part) -> list[np.ndarray]:
    """Number in `part.globs` of the source of each document, int32, for each entry."""
    globs = part.globs
    return [
        np.array([globs.index(s.name) for s in documents.sources], np.int32)[documents.source_D]
        for documents in part.documents
    ]


def _in_worker(key: tuple) -> _TrainBatches:
    batches = object.__new__(_TrainBatches)
    vars(batches).update(Shared.open(key))
    return batches


class _EvalBatches:
    """Random access to this process's rows of a part, in order, padded with empty rows."""

    def __init__(self, part: Part, config: DataConfig, groups: RouteGroups, process):
        self._part = part
        self._streams = _streams(part, config)
        self._routes = _row_routes(self._streams, groups, config)
        self._first_rows = np.cumsum([0, *(s.num_rows for s in self._streams)])
        self._config = config
        self._rows = _rows_of_process(config, *process)

    def __len__(self) -> int:
        return -(-int(self._first_rows[-1]) // self._config.batch_size)

    def __getitem__(self, k: int) -> Batch:
        places = []
        for b in self._rows:  # rows after the last one are empty
            position = k * self._config.batch_size + b
            stream = int(np.searchsorted(self._first_rows[:-1], position, side="right")) - 1
            places.append((stream, position - int(self._first_rows[stream])))
        names = ("input_ids", "segment_ids", "loss_mask", "document_ids")
        batch = _batch(self._streams, places, names, self._routes)
        for i, (stream, _) in enumerate(places):
            is_token = batch["document_ids"][i] >= 0
            batch["document_ids"][i] += self._part.first_document(stream) * is_token
        return batch


class BatchIterator:
    """The training batches of one process from a position on, prefetched in the background.

    It never ends: one epoch follows another. Use it as a context manager, or call ``close``.
    """

    def __init__(self, batches: _TrainBatches, config: DataConfig, start: int):
        self._batches = batches
        self._open = [_prefetched(batches, config, start)]
        # Grain reports an error if one of its iterators still exists when the interpreter exits.
        self._close = weakref.finalize(self, _close, self._open)
        self.position = start
        """number of the next batch to be returned; prefetched batches do not count"""
        self.wait_seconds = 0.0
        """total time that callers of ``next`` have waited, in seconds"""

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        """input_ids and segment_ids int32, loss_mask bool, each (rows of this process, L); with
        route groups also route_ids, with a tokenizer also byte_lengths (bytes per token), int32;
        with data.labels also labels, bool."""
        began = time.perf_counter()
        # Copy: arrays from a worker are in shared memory, whose lifetime Grain controls.
        batch = {name: np.array(array) for name, array in next(self._open[0]).items()}
        self.wait_seconds += time.perf_counter() - began
        self.position += 1
        return batch

    def source_bytes(self, position: int) -> np.ndarray:
        """Number of scored raw bytes of a batch over all processes, int64, in the order of
        ``train.source_names``."""
        return self._batches.source_bytes(position)

    def close(self) -> None:
        """Stop the threads and processes of the iterator."""
        self._close()

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def train_batches(
    corpus: Corpus,
    config: DataConfig,
    *,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    route_groups: RouteGroups = (),
    tells_sources: bool = False,
) -> BatchIterator:
    """Training batches from number ``start`` on.

    Process p of n gets rows [p B/n, (p+1) B/n) of each batch of B rows. With route_groups (names
    of Unicode scripts, as ``model.route_groups``) a batch also has the route of each token, with
    tells_sources its source (number in ``train.globs``) and, of bytes, its script. Raises
    ConfigError when data.batch_size is not a multiple of the number of processes, or a group has a
    name that is no script.
    """
    process = (process_index, process_count)
    batches = _TrainBatches(corpus.train, config, route_groups, seed, process, tells_sources)
    return BatchIterator(batches, config, start)


def eval_batches(
    part: Part,
    config: DataConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
    route_groups: RouteGroups = (),
) -> Iterator[Batch]:
    """Yield all rows of a part once, in order, as batches of the same shape on every process.

    A batch has the fields of a training batch and document_ids, int32 (rows, L): the number of the
    document of each token, for ``part.document_name``; -1 = padding. The last batch is padded with
    rows whose segment_ids are 0. Raises ConfigError like ``train_batches``.
    """
    batches = _EvalBatches(part, config, route_groups, (process_index, process_count))
    return (batches[k] for k in range(len(batches)))


def _close(iterators: list["grain.DatasetIterator"]) -> None:
    while iterators:
        iterators.pop().close()


def _streams(part: Part, config: DataConfig) -> list[Stream]:
    documents = part.tokens(config.tokenizer) if config.tokenizer else part.documents
    return [Stream(d, seq_len=config.seq_len, bos_eos=config.bos_eos) for d in documents]


def _row_routes(streams: list[Stream], groups: RouteGroups, config: DataConfig) -> RowRoutes | None:
    if groups and config.tokenizer:
        raise ConfigError(
            f"data.tokenizer={config.tokenizer!r} with model.route_groups: scripts are told apart "
            "in bytes; leave one of them out"
        )
    return RowRoutes(streams, groups) if groups else None


def _batch(
    streams: list[Stream],
    places: list[tuple[int, int]],
    names: tuple[str, ...],
    routes: RowRoutes | None,
) -> Batch:
    """Stack the rows at the given places, (stream, row number) each, into a batch."""
    rows = [streams[stream].row(row) for stream, row in places]
    batch = {name: np.stack([getattr(row, name) for row in rows]) for name in names}
    if routes:
        batch["route_ids"] = routes(places, rows)
    bytes_V = getattr(streams[0].documents, "bytes_V", None) if streams else None
    if bytes_V is not None:
        batch["byte_lengths"] = bytes_V[batch["input_ids"]]
    return batch


def _rows_of_process(config: DataConfig, index: int, count: int) -> range:
    if config.batch_size % count:
        raise ConfigError(
            f"data.batch_size={config.batch_size} is not divided by {count} processes: "
            f"use a multiple of {count}"
        )
    rows = config.batch_size // count
    return range(index * rows, (index + 1) * rows)


def _prefetched(batches: _TrainBatches, config: DataConfig, start: int) -> "grain.DatasetIterator":
    import grain  # imported here so that a command reads its arguments first
    from absl.flags import FLAGS

    ahead = config.prefetch_batches
    threads = 0 if config.num_workers else 1
    dataset = grain.MapDataset.source(batches)[start:].to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead * threads)
    )
    if config.num_workers:
        if not FLAGS.is_parsed():  # Grain's workers read absl flags, which are not parsed otherwise
            FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=config.num_workers, per_worker_buffer_size=ahead
            ),
            worker_init_fn=_die_with_parent,
        )
    return iter(dataset)


def _die_with_parent(worker: int, worker_count: int) -> None:
    """End a worker when the run is killed; by default a Grain worker would wait forever."""
    del worker, worker_count

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
