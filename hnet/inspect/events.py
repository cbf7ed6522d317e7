"""TensorBoard event files, written in the thread of the caller, so that a full disk raises here.

The functions below create `Summary.Value` objects, the content of events. Descriptions are Markdown
that TensorBoard renders, so text from data must be escaped first.
"""

import contextlib
import io
import os
import socket
import time
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.histogram import metadata as histogram_plugin
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_plugin
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.image import metadata as image_plugin
from tensorboard.plugins.scalar import metadata as scalar_plugin
from tensorboard.plugins.text import metadata as text_plugin
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

Value = Summary.Value


class EventFile:
    """One new event file in a folder; `add` flushes each event to the operating system.

    Raises OSError if the file cannot be written.
    """

    def __init__(self, folder: str | os.PathLike):
        os.makedirs(folder, exist_ok=True)
        now = time.time_ns()  # keeps the name unique for restarts within one second
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
        with contextlib.ExitStack() as opened:
            self._records = RecordWriter(
                opened.enter_context(open(os.path.join(folder, name), "xb"))
            )
            self._write(Event(file_version="brain.Event:2"))
            opened.pop_all()

    def add(self, values: Sequence[Value], step: int) -> None:
        """Write the values of one step as one event."""
        self._write(Event(step=step, summary=Summary(value=values)))

    def purge(self, step: int) -> None:
        """Invalidate all earlier events from `step` on, in this file and in others."""
        self._write(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def close(self) -> None:
        self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()


def scalar(tag: str, description: str, value: float) -> Value:
    metadata = scalar_plugin.create_summary_metadata("", description)
    return Value(tag=tag, simple_value=float(value), metadata=metadata)


def histogram(
    tag: str, description: str, values: np.ndarray, bins: int | np.ndarray
) -> Value | None:
    """Histogram of the finite values, an array of any shape; None if there are none."""
    values = np.asarray(values, np.float64).reshape(-1)
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    counts, edges = np.histogram(values, bins)
    proto = HistogramProto(
        min=values.min(),
        max=values.max(),
        num=values.size,
        sum=values.sum(),
        sum_squares=values @ values,
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )
    metadata = histogram_plugin.create_summary_metadata("", description)
    return Value(tag=tag, histo=proto, metadata=metadata)


def image(tag: str, description: str, pixels_HWC: np.ndarray) -> Value:
    """An RGB image, uint8 (height, width, 3)."""
    png = io.BytesIO()
    Image.fromarray(pixels_HWC, "RGB").save(png, "PNG")
    height, width, depth = pixels_HWC.shape
    proto = Summary.Image(
        height=height, width=width, colorspace=depth, encoded_image_string=png.getvalue()
    )
    metadata = image_plugin.create_summary_metadata("", description, converted_to_tensor=False)
    return Value(tag=tag, image=proto, metadata=metadata)


def text(tag: str, description: str, markdown: str) -> Value:
    metadata = text_plugin.create_summary_metadata("", description)
    return _with_tensor(tag, markdown.encode(), metadata)


def charts(categories: Mapping[str, Mapping[str, Sequence[str]]]) -> Value:
    """Charts of the custom scalars tab: category -> title -> patterns of tags."""
    layout = layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=category,
                chart=[
                    layout_pb2.Chart(
                        title=title, multiline=layout_pb2.MultilineChartContent(tag=list(tags))
                    )
                    for title, tags in found.items()
                ],
            )
            for category, found in categories.items()
        ]
    )
    metadata = custom_scalar.create_summary_metadata()
    return _with_tensor(custom_scalar.CONFIG_SUMMARY_TAG, layout.SerializeToString(), metadata)


def hparams(values: Mapping[str, bool | int | float | str]) -> Sequence[Value]:
    """Hyperparameters of a run, without a fixed list of hyperparameters."""
    return hparams_pb(dict(values)).value


def session_end() -> Value:
    """The end of a run that logged `hparams`."""
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    data = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    metadata = hparams_plugin.create_summary_metadata(data)
    tag, tensor = hparams_plugin.SESSION_END_INFO_TAG, hparams_plugin.NULL_TENSOR
    return Value(tag=tag, metadata=metadata, tensor=tensor)


def _with_tensor(tag: str, content: bytes, metadata: SummaryMetadata) -> Value:
    tensor = make_tensor_proto(content, dtype=types_pb2.DT_STRING)
    return Value(tag=tag, tensor=tensor, metadata=metadata)
