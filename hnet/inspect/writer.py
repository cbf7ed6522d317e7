"""TensorBoard output of a run: event files, written without TensorFlow, and segmentations.

Numbers have their names in metrics.jsonl; `tags.tag_of` gives the tag of each. The results that
`RunWriter.write_segmentations` measures on its texts are under ``probe/``.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hnet.errors import ConfigError
from hnet.inspect import events
from hnet.inspect.events import EventFile, Value
from hnet.inspect.metrics import summarize
from hnet.inspect.mirror import Mirror
from hnet.inspect.p_map import labelled_p_map
from hnet.inspect.render import to_markdown
from hnet.inspect.segmentation import Segmentation
from hnet.inspect.store import SegmentationLog
from hnet.inspect.tags import Tag, tag_of, without_folders
from hnet.printable import printable

_log = logging.getLogger(__name__)
_SEEN = "bytes_seen/"
TEXT_SUMMARIES = 8
"""maximum number of texts per step written as Markdown; TensorBoard keeps few steps of them"""

DASHBOARDS = {
    "H-Net": {
        "bits per byte": [r"(train|eval)/bpb$"],
        "bits per byte by script": [r"(train|eval)/script_.*/bpb$"],
        "bits per byte by source": [r"(train|eval)/source_.*/bpb$"],
        "losses": [r"train/loss/"],
        "bytes per chunk": [r"stage\d+/bytes_per_chunk$"],
        "boundary rate": [r"stage\d+/boundary_rate$"],
        "overflow (clipped chunks)": [r"stage\d+/overflow_frac$"],
        "slot utilization": [r"stage\d+/slot_utilization$"],
        "bytes per chunk by route": [r"stage\d+/route_.*/bytes_per_chunk$"],
        "norm of the gradient by part": [r"optim/grad_norm/"],
        "norm of the update by part": [r"optim/update_norm/"],
    },
    "H-Net boundaries on probe texts": {
        "F1 against gold, with controls": [r"probe/stage\d+/f1_"],
        "bytes per chunk": [r"probe/stage\d+/(bytes_per_chunk|chunk_bytes_p\d+)$"],
        "bytes per chunk by route": [r"probe/stage\d+/route_.*/bytes_per_chunk$"],
        "boundaries inside a character": [r"probe/stage\d+/utf8_split_frac$"],
        "undecided (p in 0.4-0.6)": [r"probe/stage\d+/undecided_frac$"],
    },
}
"""Charts of the custom scalars tab: category -> title -> patterns of tags."""


def short_names(fields: Iterable[str]) -> dict[str, str]:
    """Field of metrics.jsonl -> the field with the names of sources without their folders."""
    fields = list(fields)
    sources = (field.removeprefix(_SEEN) for field in fields if field.startswith(_SEEN))
    labels = {_SEEN + name: _SEEN + label for name, label in without_folders(sources).items()}
    return {field: labels.get(field, field) for field in fields}


class RunWriter:
    """Writes the log folder of a run. Use one per run, in one process; close it, or use `with`.

    An error while writing, such as a full disk, is reported once and ends the log, not the run.
    What was written before stays readable.
    """

    def __init__(
        self,
        logdir: str | os.PathLike,
        *,
        resume_step: int | None = None,
        mirror: str | None = None,
        mirror_secs: float = 60.0,
        say: Callable[[str], None] = _log.warning,
    ):
        """logdir: local folder. mirror: URL such as gs://bucket/run, to which the folder is copied
        in the background. resume_step: step from which training continues; entries that an earlier
        process logged after it are invalidated (they stay in the files); -1: all entries are.

        Raises ConfigError for a folder that cannot be written.
        """
        self.logdir, self._say, self._is_open = os.fspath(logdir), say, True
        self._mirror = Mirror(self.logdir, mirror, period=mirror_secs) if mirror else None
        self._told: set[str] = set()
        self._has_hparams = False
        try:
            self._events = EventFile(self.logdir)
            self._log = SegmentationLog(self.logdir, resume_step=resume_step)
        except OSError as e:
            raise ConfigError(
                f"log folder {self.logdir!r} cannot be written: {e.strerror}"
            ) from None
        with self._guarded():
            if resume_step is not None:
                self._events.purge(resume_step + 1)
            self._events.add([events.charts(DASHBOARDS)], 0)

    @property
    def notes(self) -> list[str]:
        """Damage found in the folder, one line per problem."""
        return self._log.notes

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """End the log on an error of the file system."""
        try:
            yield
        except OSError as e:
            self._is_open = False
            self._say(
                f"the log in {self.logdir} cannot be written ({e.strerror}): the run goes on "
                "without it"
            )

    def _add(self, step: int, values: Sequence[Value | None]) -> None:
        values = [value for value in values if value is not None]
        if self._is_open and values:
            with self._guarded():
                self._events.add(values, step)

    def go_back(self, step: int) -> None:
        """Invalidate entries after `step`, because the run repeats these steps; -1: all entries."""
        if self._is_open:
            with self._guarded():
                self._events.purge(step + 1)
                self._log.go_back(step)

    def _described(self, field: str) -> Tag:
        """Tag of a field, with its description only the first time; TensorBoard uses the first."""
        tag = tag_of(field)
        if tag.name in self._told:
            return Tag(tag.name, "")
        self._told.add(tag.name)
        return tag

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers, by their names in metrics.jsonl, as one event."""
        shown = short_names(values)
        self._add(
            step,
            [
                events.scalar(*self._described(shown[field]), value)
                for field, value in values.items()
            ],
        )

    def histogram(
        self, step: int, field: str, values: np.ndarray, bins: int | np.ndarray = 30
    ) -> None:
        """Log a histogram of the finite values, an array of any shape; bins: number or edges."""
        self._add(step, [events.histogram(*self._described(field), values, bins)])

    def text(self, step: int, field: str, markdown: str) -> None:
        """Log Markdown, which TensorBoard renders; text from data must be escaped."""
        self._add(step, [events.text(*self._described(field), markdown)])

    def image(self, step: int, field: str, pixels_HWC: np.ndarray) -> None:
        """Log an RGB image, uint8 (height, width, 3)."""
        self._add(step, [events.image(*self._described(field), pixels_HWC)])

    def configuration(self, step: int, content: Mapping[str, Any]) -> None:
        """Log the configuration of a start as text, in JSON form."""
        lines = json.dumps(content, indent=2, ensure_ascii=False).splitlines()
        self.text(step, "configuration", "\n".join("    " + printable(line) for line in lines))

    def hparams(self, values: Mapping[str, bool | int | float | str]) -> None:
        """Log the hyperparameters of this run; its scalars are the metrics of the HParams tab.

        There is no fixed list of hyperparameters, so runs with different ones share one table.
        """
        self._add(0, events.hparams(values))
        self._has_hparams = True

    def write_segmentations(
        self, step: int, segmentations: Sequence[Segmentation], *, summaries: bool = True
    ) -> dict[str, float]:
        """Log the probe texts of a step: the data of the Boundaries tab.

        With summaries, also log data that TensorBoard shows without the plugin: scalars
        (`metrics.summarize`), distributions of p and chunk length, images of p over position, texts
        with marks. Returns the scalars.
        """
        if self._is_open:
            with self._guarded():
                self._log.write(step, segmentations)
        return self._summaries(step, segmentations) if summaries and segmentations else {}

    def _summaries(self, step: int, segmentations: Sequence[Segmentation]) -> dict[str, float]:
        scalars = {f"probe/{tag}": v for tag, v in summarize(segmentations).items()}
        self.scalars(step, scalars)
        for i in range(max(len(seg.stages) for seg in segmentations)):
            texts = {
                n: seg for n, seg in enumerate(segmentations) if len(seg.stages) > i and seg.data
            }
            if texts:
                probs = np.concatenate([seg.stages[i].probs for seg in texts.values()])
                lengths = np.concatenate([seg.chunk_lengths(i) for seg in texts.values()])
                self.histogram(step, f"probe/stage{i}/boundary_prob", probs, np.linspace(0, 1, 21))
                self.histogram(step, f"probe/stage{i}/chunk_bytes", lengths)
                self.image(step, f"probe/stage{i}/p_map", labelled_p_map(texts, i))
        for n, seg in enumerate(segmentations[:TEXT_SUMMARIES]):
            self.text(step, f"probe/text_{n:02}", to_markdown(seg))
        return scalars

    def close(self) -> None:
        """Close the files and wait for the last copy to the mirror."""
        if self._has_hparams:
            self._add(0, [events.session_end()])
        for file in (self._events, self._log):
            with self._guarded() if self._is_open else contextlib.suppress(OSError):
                file.close()
        if self._mirror is not None:
            self._mirror.close()
