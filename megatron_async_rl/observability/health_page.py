"""The pages of TensorBoard's Custom Scalars: "health" and "time".

TensorBoard draws all lines of a run in one colour. Each line of a chart is therefore a copy of a
tag in a run of its own, `line 1` to `line 4` (folders below run.dir/tensorboard): the list of runs
shows their colours, the title of a chart names its lines in that order.
"""

from __future__ import annotations

import re

from tensorboard.plugins.custom_scalar import layout_pb2

MAX_LINES = 4
# page -> chart -> line -> the tag that it copies
PAGES: dict[str, dict[str, dict[str, str]]] = {
    "health": {
        "reward": {
            "trained": "reward/mean",
            "all scored": "reward/all_mean",
            "spread in a group": "reward/group_std_mean",
            "evaluation": "eval/[^/]+/accuracy",
        },
        "staleness": {
            "max": "staleness/max",
            "mean": "staleness/mean",
            "bound": "staleness/limit",
        },
        "idle share": {
            "trainer": "perf/trainer_wait_fraction",
            "servers": "perf/engine_idle_fraction",
        },
        "tokens per GPU-second": {
            "trained": "perf/train_tokens_per_gpu_s",
            "generated": "perf/generate_tokens_per_gpu_s",
        },
        "KL": {
            "of the update": "train/approx_kl",
            "from behavior": "train/behavior_approx_kl",
            "from reference": "train/reference_kl",
        },
        "engine and trainer differ": {
            "probe": "probe/logprob_diff_mean",
            "sampled tokens": "train/logprob_diff_mean",
        },
        "response tokens": {
            "trained, mean": "rollout/response_tokens_mean",
            "sampled, mean": "rollout/sampled_tokens_mean",
            "sampled, p90": "rollout/sampled_tokens_p90",
        },
        "share of samples": {
            "cut off": "rollout/no_eos_fraction",
            "interrupted": "rollout/interrupted_fraction",
        },
        "dropped groups": {
            "stale": "drops/stale_groups",
            "failed": "drops/failed_groups",
            "filtered": "drops/filtered_groups",
        },
    },
    "time": {
        "seconds of a step": {
            "all": "perf/time/step_s",
            "wait for batch": "perf/time/wait_for_batch_s",
            "proximal": "perf/time/proximal_s",
            "train": "perf/time/train_s",
        },
        "seconds of a weight update": {
            "all": "sync/total_s",
            "gather": "sync/gather_s",
            "wire": "sync/wire_s",
            "pause": "sync/pause_s",
        },
        "share of the GPU's matrix rate": {
            "nominal": "perf/mfu",
            "measured": "perf/mfu_of_matrix_rate",
        },
        "GiB of a trainer's GPU": {
            "peak": "perf/trainer_peak_memory_gib",
        },
        "decoded tokens per second": {
            "all servers": "engine/decode_tokens_per_s",
        },
        "requests in the servers": {
            "running": "engine/running_requests",
            "queued": "engine/queued_requests",
        },
        "share in the servers": {
            "KV cache in use": "engine/kv_use_fraction",
            "cache hits": "engine/cache_hit_fraction",
        },
    },
}
_LINES = [
    (re.compile(source), number, f"health/{_chart.replace(' ', '_')}/{line.replace(' ', '_')}")
    for _page in PAGES.values()
    for _chart, _lines in _page.items()
    for number, (line, source) in enumerate(_lines.items(), 1)
]


def lines_of(tag: str) -> list[tuple[int, str]]:
    """Returns the number of the line and the tag of each copy of `tag`."""
    return [(number, copy) for source, number, copy in _LINES if source.fullmatch(tag)]


def layout() -> bytes:
    """Returns the layout of all pages."""
    pages = []
    for page, charts in PAGES.items():
        found = []
        for chart, lines in charts.items():
            pattern = f"^health/{re.escape(chart.replace(' ', '_'))}/.*$"
            title = f"{chart}: " + ", ".join(f"{n} {line}" for n, line in enumerate(lines, 1))
            content = layout_pb2.MultilineChartContent(tag=[pattern])
            found.append(layout_pb2.Chart(title=title, multiline=content))
        pages.append(layout_pb2.Category(title=page, chart=found))
    return layout_pb2.Layout(category=pages).SerializeToString()
