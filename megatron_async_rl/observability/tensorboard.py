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
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.text.metadata import create_summary_metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

MAX_BINS = 64


class TensorBoard:
    """An event file, with a page "async RL" under Custom Scalars."""

    def __init__(self, folder: Path) -> None:
        self._writer = EventFileWriter(str(folder))
        metadata = layout_metadata.create_summary_metadata()
        self._add(_string_value(layout_metadata.CONFIG_SUMMARY_TAG, _layout(), metadata), 0)

    def scalar(self, tag: str, value: float, step: int) -> None:
        assert "/" in tag, f"{tag!r} is not of the form area/name"
        self._add(Summary.Value(tag=tag, simple_value=value), step)

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
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, value: Summary.Value, step: int) -> None:
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=[value]))
        self._writer.add_event(event)


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


def _layout() -> bytes:
    """Returns the layout of the page "async RL": reward, staleness, time per phase."""

    def lines(title: str, *tags: str) -> layout_pb2.Chart:
        return layout_pb2.Chart(
            title=title,
            multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$" for tag in tags]),
        )

    band = layout_pb2.MarginChartContent.Series(
        value="staleness/mean", lower="staleness/min", upper="staleness/max"
    )
    charts = [
        lines("reward", "reward/mean", "eval/.*accuracy"),
        layout_pb2.Chart(
            title="staleness of trained tokens: mean, min to max",
            margin=layout_pb2.MarginChartContent(series=[band]),
        ),
        lines("staleness against its limit", "staleness/max", "staleness/limit"),
        lines("where the time goes, seconds of a step", "perf/time/.*"),
        lines("weight update, seconds", "sync/.*_s"),
    ]
    return layout_pb2.Layout(
        category=[layout_pb2.Category(title="async RL", chart=charts)]
    ).SerializeToString()
