"""Writes TensorBoard event files with the `tensorboard` package alone.

The package has an event writer but builds only scalar summaries, so histograms, texts and the page
of Custom Scalars are built here. torch.utils.tensorboard and tensorboardX (2.6) would build them
too, but both import torch, which the controller must not; and tensorboardX's writer thread ends
silently on the first OSError, where tensorboard's raises it at the next call.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.text.metadata import create_summary_metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_async_rl.observability import health_page

MAX_BINS = 64


class TensorBoard:
    """The event files of a run, with the pages of health_page.py under Custom Scalars."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer = EventFileWriter(str(folder))
        self._lines: dict[int, EventFileWriter] = {}  # number of the line -> its run
        self._copied: dict[str, str] = {}  # copy -> the first tag of which it was one
        metadata = layout_metadata.create_summary_metadata()
        layout = health_page.layout()
        self._add(_string_value(layout_metadata.CONFIG_SUMMARY_TAG, layout, metadata), 0)

    def scalars(self, version: int, values: dict[str, float]) -> None:
        """Writes values by tag, which is area/name."""
        for tag, value in values.items():
            assert "/" in tag, f"{tag!r} is not of the form area/name"
            self._add(Summary.Value(tag=tag, simple_value=value), version)
            for number, copy in health_page.lines_of(tag):
                if (
                    self._copied.setdefault(copy, tag) == tag
                ):  # of several evaluation sets the first
                    line = Summary.Value(tag=copy, simple_value=value)
                    self._add(line, version, self._line_writer(number))
        self.flush()

    def histogram(
        self, tag: str, values: np.ndarray, step: int, counts: np.ndarray | None = None
    ) -> None:
        """Writes `values`, each counted `counts` times; integers get bins of whole numbers."""
        if not values.size:
            return
        counts = np.ones_like(values) if counts is None else counts
        bins, edges = np.histogram(values, bins=_bin_edges(values), weights=counts)
        histogram = HistogramProto(
            min=values.min(),
            max=values.max(),
            num=counts.sum(),
            sum=(values * counts).sum(dtype=np.float64),
            sum_squares=(np.square(values, dtype=np.float64) * counts).sum(),
            bucket_limit=edges[1:],
            bucket=bins,
        )
        self._add(Summary.Value(tag=tag, histo=histogram), step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        self._add(
            _string_value(tag, markdown.encode(), text_metadata(display_name="", description="")),
            step,
        )

    def flush(self) -> None:
        for writer in (self._writer, *self._lines.values()):
            writer.flush()

    def close(self) -> None:
        for writer in (self._writer, *self._lines.values()):
            writer.close()

    def _line_writer(self, number: int) -> EventFileWriter:
        if number not in self._lines:
            folder = self._folder / f"line {number}"
            self._lines[number] = EventFileWriter(str(folder))
        return self._lines[number]

    def _add(self, value: Summary.Value, step: int, writer: EventFileWriter | None = None) -> None:
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=[value]))
        (writer or self._writer).add_event(event)


def _bin_edges(values: np.ndarray) -> np.ndarray | int:
    if np.issubdtype(values.dtype, np.integer):
        low, high = int(values.min()), int(values.max())
        width = -(-(high - low + 1) // MAX_BINS)
        return np.arange(low, high + width + 1, width) - 0.5
    return MAX_BINS


def _string_value(tag: str, content: bytes, metadata: object) -> Summary.Value:
    return Summary.Value(
        tag=tag, metadata=metadata, tensor=TensorProto(dtype="DT_STRING", string_val=[content])
    )
