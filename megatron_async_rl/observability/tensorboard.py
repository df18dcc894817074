"""The event file of TensorBoard, written with the `tensorboard` package alone: neither torch nor TensorFlow is imported."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

MAX_BUCKETS = 64  # bars of a histogram


class TensorBoard:
    """An event file of the `tensorboard` package, with a page "async RL" laid out under Custom Scalars."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import (
            Event,  # here: a third of a second that readers need not pay
        )
        from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
        from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
        from tensorboard.plugins.custom_scalar.metadata import (
            create_summary_metadata as layout_metadata,
        )
        from tensorboard.plugins.text.metadata import create_summary_metadata as text_metadata
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._Event, self._Summary, self._Histogram = Event, Summary, HistogramProto
        self._text_metadata = text_metadata(display_name="", description="")
        self._writer = EventFileWriter(str(folder))
        self._add(_string_value(CONFIG_SUMMARY_TAG, _layout(), layout_metadata()), 0)

    def scalar(self, tag: str, value: float, step: int) -> None:
        assert "/" in tag, f"{tag!r} is not of the form area/name"
        self._add(self._Summary.Value(tag=tag, simple_value=value), step)

    def histogram(
        self, tag: str, values: np.ndarray, step: int, counts: np.ndarray | None = None
    ) -> None:
        """`values` of any shape, each `counts` times (once, if not given); integers get bars of whole numbers."""
        if not values.size:
            return
        counts = np.ones_like(values) if counts is None else counts
        bars, edges = np.histogram(values, bins=_bin_edges(values), weights=counts)
        histogram = self._Histogram(
            min=values.min(),
            max=values.max(),
            num=counts.sum(),
            sum=(values * counts).sum(dtype=np.float64),
            sum_squares=(np.square(values, dtype=np.float64) * counts).sum(),
            bucket_limit=edges[1:],
            bucket=bars,
        )
        self._add(self._Summary.Value(tag=tag, histo=histogram), step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        self._add(_string_value(tag, markdown.encode(), self._text_metadata), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, value: Summary.Value, step: int) -> None:
        self._writer.add_event(
            self._Event(wall_time=time.time(), step=step, summary=self._Summary(value=[value]))
        )


def _bin_edges(values: np.ndarray) -> np.ndarray | int:
    if np.issubdtype(values.dtype, np.integer):
        low, high = int(values.min()), int(values.max())
        width = -(-(high - low + 1) // MAX_BUCKETS)
        return np.arange(low, high + width + 1, width) - 0.5
    return MAX_BUCKETS


def _string_value(tag: str, content: bytes, metadata: object) -> Summary.Value:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto

    return Summary.Value(
        tag=tag, metadata=metadata, tensor=TensorProto(dtype="DT_STRING", string_val=[content])
    )


def _layout() -> bytes:
    """The page "async RL" under Custom Scalars: does it learn, is it fresh, where does the time go."""
    from tensorboard.plugins.custom_scalar.layout_pb2 import (
        Category,
        Chart,
        Layout,
        MarginChartContent,
        MultilineChartContent,
    )

    def lines(title: str, *tags: str) -> Chart:
        return Chart(title=title, multiline=MultilineChartContent(tag=[f"^{tag}$" for tag in tags]))

    band = MarginChartContent.Series(
        value="staleness/mean", lower="staleness/min", upper="staleness/max"
    )
    charts = [
        lines("reward", "reward/mean", "eval/.*accuracy"),
        Chart(
            title="staleness of trained tokens: mean, min to max",
            margin=MarginChartContent(series=[band]),
        ),
        lines("staleness against its limit", "staleness/max", "staleness/limit"),
        lines("where the time goes, seconds of a step", "perf/time/.*"),
        lines("weight update, seconds", "sync/.*_s"),
    ]
    return Layout(category=[Category(title="async RL", chart=charts)]).SerializeToString()
