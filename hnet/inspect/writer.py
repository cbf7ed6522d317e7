"""What a run writes for TensorBoard: event files without TensorFlow, and its segmentations.

Tags that dashboards and people rely on: ``train/bpb``, ``loss/ce``, ``eval/bpb``, for each stage
``stage0/boundary_rate``, ``stage0/bytes_per_chunk``, ``stage0/overflow_frac``,
``stage0/slot_utilization``, and for each route ``stage0/route_<name>/bytes_per_chunk``. What
`RunWriter.write_segmentations` measures on its texts stands under ``probe/``.
"""

import os
import time
from collections.abc import Mapping, Sequence

import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import custom_scalars, hparams

from hnet.inspect.metrics import summarize
from hnet.inspect.mirror import Mirror
from hnet.inspect.render import to_markdown
from hnet.inspect.segmentation import Segmentation
from hnet.inspect.store import SegmentationLog

TEXT_SUMMARIES = 8
"""texts of a step written as Markdown; TensorBoard itself keeps few steps of them"""
P_MAP_BYTES = 256
P_MAP_TEXTS = 32
_CELL = (10, 4)  # pixels of one probability in an image: high, wide
_GAP = 2
_BLUE = np.array([0, 114, 178], np.float64)  # Okabe-Ito

DASHBOARDS = {
    "H-Net": {
        "bits per byte": [r"(train|eval)/bpb$"],
        "losses": [r"loss/"],
        "bytes per chunk": [r"stage\d+/bytes_per_chunk$"],
        "boundary rate": [r"stage\d+/boundary_rate$"],
        "overflow (clipped chunks)": [r"stage\d+/overflow_frac$"],
        "slot utilization": [r"stage\d+/slot_utilization$"],
        "bytes per chunk by route": [r"stage\d+/route_.*/bytes_per_chunk$"],
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


class RunWriter:
    """Writes one run's log folder. One process of a run should have one; close it, or use `with`.

    logdir is a local folder. mirror, a URL such as gs://bucket/run, gets a copy in the background.
    resume_step is the step training goes on from: what an earlier process logged after it no
    longer counts (it stays in the files).
    """

    def __init__(
        self,
        logdir: str | os.PathLike,
        *,
        resume_step: int | None = None,
        mirror: str | None = None,
        mirror_secs: float = 60.0,
        flush_secs: int = 10,
    ):
        logdir = os.fspath(logdir)
        self._mirror = Mirror(logdir, mirror, period=mirror_secs) if mirror else None
        purge_step = None if resume_step is None else resume_step + 1
        self._events = SummaryWriter(
            logdir,
            purge_step=purge_step,
            flush_secs=flush_secs,
            filename_suffix=f".{time.time_ns()}",  # else a restart within a second overwrites
        )
        self._log = SegmentationLog(logdir, resume_step=resume_step)
        self._session_end: Summary | None = None
        charts = {
            category: {title: ["Multiline", tags] for title, tags in charts.items()}
            for category, charts in DASHBOARDS.items()
        }
        self._add(custom_scalars(charts), 0)

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars by tag, all in one event."""
        summary = Summary(
            value=[Summary.Value(tag=tag, simple_value=float(v)) for tag, v in values.items()]
        )
        self._add(summary, step)

    def histogram(
        self, step: int, tag: str, values: np.ndarray, bins: int | np.ndarray = 30
    ) -> None:
        """Log the distribution of the finite values, of any shape; bins: a number, or the edges."""
        values = np.asarray(values, np.float64).reshape(-1)
        values = values[np.isfinite(values)]
        if values.size:
            counts, limits = np.histogram(values, bins)
            self._events.add_histogram_raw(
                tag, values.min(), values.max(), values.size, values.sum(), values @ values,
                limits[1:].tolist(), counts.tolist(), global_step=step,
            )  # fmt: skip

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Log Markdown, which TensorBoard renders: escape what comes from data."""
        self._events.add_text(tag, markdown, step)

    def image(self, step: int, tag: str, pixels_HWC: np.ndarray) -> None:
        """Log an RGB image, uint8 (height, width, 3)."""
        self._events.add_image(tag, pixels_HWC, step, dataformats="HWC")

    def hparams(self, values: Mapping[str, bool | int | float | str]) -> None:
        """Say what distinguishes this run; its scalars become the metrics of the HParams tab.

        No list of hyperparameters is fixed, so runs with different ones all show in one table.
        """
        _, start, self._session_end = hparams(dict(values), {})
        self._add(start, 0)

    def write_segmentations(
        self, step: int, segmentations: Sequence[Segmentation], *, summaries: bool = True
    ) -> dict[str, float]:
        """Log the probe texts of a step: the data of the Boundaries tab.

        With summaries, also what shows without the plugin: scalars (`metrics.summarize`),
        distributions of p and chunk length, images of p over position, texts with marks. Returns
        the scalars.
        """
        self._log.write(step, segmentations)
        return self._summaries(step, segmentations) if summaries and segmentations else {}

    def _summaries(self, step: int, segmentations: Sequence[Segmentation]) -> dict[str, float]:
        scalars = {f"probe/{tag}": v for tag, v in summarize(segmentations).items()}
        self.scalars(step, scalars)
        for i in range(max(len(seg.stages) for seg in segmentations)):
            texts = [seg for seg in segmentations if len(seg.stages) > i and seg.data]
            if texts:
                probs = np.concatenate([seg.stages[i].probs for seg in texts])
                lengths = np.concatenate([seg.chunk_lengths(i) for seg in texts])
                self.histogram(step, f"probe/stage{i}/boundary_prob", probs, np.linspace(0, 1, 21))
                self.histogram(step, f"probe/stage{i}/chunk_bytes", lengths)
                self.image(step, f"probe/stage{i}/p_map", p_map(texts, i))
        for n, seg in enumerate(segmentations[:TEXT_SUMMARIES]):
            self.text(step, f"probe/text_{n:02}", to_markdown(seg))
        return scalars

    def flush(self) -> None:
        """Hand what was logged to the operating system."""
        self._events.flush()
        self._log.flush()

    def close(self) -> None:
        """Finish the files; the last copy to the mirror is made before this returns."""
        if self._session_end is not None:
            self._add(self._session_end, 0)
        self._events.close()
        self._log.close()
        if self._mirror is not None:
            self._mirror.close()

    def _add(self, summary: Summary, step: int) -> None:
        self._events.file_writer.add_summary(summary, step)


def p_map(segmentations: Sequence[Segmentation], stage: int) -> np.ndarray:
    """Probabilities of `stage` over the first bytes of each text, uint8 (height, width, 3).

    A row a text, from white (0) to blue (1), grey behind its end. An inner stage decides once a
    chunk of the stage outside it, and its p fills that chunk.
    """
    rows = [_p_of_bytes(seg, stage) for seg in segmentations[:P_MAP_TEXTS]]
    width = max(len(row) for row in rows)
    image = np.full((len(rows), width, 3), 200, np.uint8)
    for pixels, p in zip(image, rows):
        pixels[: len(p)] = (255 + p[:, None] * (_BLUE - 255)).round()
    image = image.repeat(_CELL[0], axis=0).repeat(_CELL[1], axis=1)
    rows_RHWC = image.reshape(len(rows), _CELL[0], -1, 3)
    rows_RHWC[:, -_GAP:] = 255  # a white line between texts
    return image


def _p_of_bytes(seg: Segmentation, stage: int) -> np.ndarray:
    """p of the position each of the first bytes belongs to, (bytes,)."""
    count = min(len(seg.data), P_MAP_BYTES)
    position = np.searchsorted(seg.positions(stage), np.arange(count), side="right") - 1
    return np.asarray(seg.stages[stage].probs)[position]
