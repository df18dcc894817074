"""Rules for messages of workers: senders, ranges of fields. Each message is checked against them.

controller/handlers.py calls `hello_problem` for each Hello and `problem` for each other message,
before any other code reads it. A message with a problem costs its sender the connection and changes
nothing. Leases and the state of an update are checked later, where they are kept: a message that
does not fit them may be late, which is not an error of its sender. The tokens of samples are
checked in controller/tokens.py.

RULES: message type -> senders that may send it, and a check of its fields together.
FIELDS: name of a field, in any message and in the structs that it contains -> its range.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from megatron_async_rl.protocol import messages, weight_messages
from megatron_async_rl.protocol.messages import Hello, Message
from megatron_async_rl.protocol.user_metrics import are_valid
from megatron_async_rl.storage import checkpoints

LARGEST = (1 << 53) - 1  # of an integer; every float and every file format can hold it
MAX_CAPACITY = 1 << 20
MAX_ENTRIES = 1 << 20  # of a list or a dictionary
MAX_METRICS = 1024
MAX_PROBE_TOKENS = 1 << 20
_NAME = re.compile(r"(rollout|reward|trainer)-[0-9]{1,9}")
_METRIC = re.compile(r"[a-z0-9_]{1,32}(/[a-zA-Z0-9_.-]{1,64}){1,3}")
_PHASE = re.compile(r"[a-z0-9_]{1,64}")
_GROUP = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
_ADDRESS = re.compile(r"[a-zA-Z0-9_.:%\[\]-]{1,255}")
_TENSOR = re.compile(r"[!-~]([ -~]{0,510}[!-~])?")
_DIGEST = re.compile(r"[0-9a-zA-Z]{1,128}")
_FILE = re.compile(r"[a-zA-Z0-9_-]{1,128}\.safetensors")


@dataclass(frozen=True)
class Limits:
    """The state of the run that ranges depend on."""

    version: int  # of the trainer's weights
    steps: int
    num_leaders: int
    num_stages: int


Check = Callable[[Any, Hello, Limits], str]


@dataclass(frozen=True)
class Rule:
    """`senders`: one of these must be among `senders_of` the worker. `check`: returns a problem."""

    senders: frozenset[str]
    check: Check | None = None


def senders_of(hello: Hello) -> frozenset[str]:
    """Returns the names that RULES has for this worker."""
    found = {"rollout worker": hello.role == "rollout", "reward worker": hello.role == "reward"}
    if hello.role == "trainer":
        found |= {
            "trainer": True,
            "leader": hello.leader >= 0,
            "weight source": hello.stage >= 0,
            "first trainer rank": hello.name == "trainer-0",
        }
    return frozenset(name for name, applies in found.items() if applies)


def problem(message: Message, hello: Hello, limits: Limits) -> str:
    """Returns why this worker may not send this message; empty if it may."""
    kind = type(message).__name__
    rule = RULES.get(type(message))
    if rule is None:
        return f"{kind}, which no worker may send"
    if rule.senders.isdisjoint(senders_of(hello)):
        return f"{kind}, which only a {' or '.join(sorted(rule.senders))} may send"
    found = field_problem(message)
    if not found and rule.check:
        found = rule.check(message, hello, limits)
    return f"{kind} with {found}" if found else ""


def hello_problem(hello: Hello, limits: Limits) -> str:
    """Returns why a worker may not join with this Hello; empty if it may."""
    match = _NAME.fullmatch(hello.name)
    if not match or match[1] != hello.role:
        return f"Hello with name {shown(hello.name)}, must be {hello.role}-N"
    highest = {
        "pid": (1, LARGEST),
        "capacity": (0, MAX_CAPACITY),
        "leader": (-1, limits.num_leaders - 1),
        "stage": (-1, limits.num_stages - 1),
        "serving": (-1, LARGEST),
    }
    for name, (low, high) in highest.items():
        if not low <= getattr(hello, name) <= high:
            return f"Hello with {name} = {getattr(hello, name)}, must be {low} to {high}"
    if hello.role != "trainer" and (hello.leader, hello.stage) != (-1, -1):
        return f"Hello of a {hello.role} worker with leader or stage"
    return ""


# ---- the checks of RULES


def _score_requested(request: messages.ScoreRequest, hello: Hello, limits: Limits) -> str:
    if request.call < 1:
        return f"call = {request.call}: that of a finished sample"
    if request.row:
        return "a row, which the controller adds"
    return "text_ends, which the controller adds" if request.text_ends else ""


def _step_done(step: messages.StepDone, hello: Hello, limits: Limits) -> str:
    if step.version < 1:
        return "version = 0, which no step makes"
    busy_s = [step.stats.get(f"perf/time/{phase}_s", math.nan) for phase in ("proximal", "train")]
    if "train/tokens" in step.stats and not (min(busy_s) >= 0 and 0 < sum(busy_s) < math.inf):
        return f"train/tokens, and times of {shown(busy_s)} s for the passes"
    return ""


def _newest(limits: Limits) -> int:
    """Returns the newest version that the trainer may have.

    The report of its step may still come: another rank overtook it, or its connection broke.
    """
    return limits.version + (limits.version < limits.steps)


def _checkpoint_saved(saved: messages.CheckpointSaved, hello: Hello, limits: Limits) -> str:
    if saved.version > (newest := _newest(limits)):
        return f"version = {saved.version}, the newest is {newest}"
    expected = checkpoints.folder_name(saved.version)
    if saved.folder != expected:
        return f"folder = {shown(saved.folder)}, must be {expected}"
    return ""


def _publish_offer(offer: weight_messages.PublishOffer, hello: Hello, limits: Limits) -> str:
    if offer.version > (newest := _newest(limits)):
        return f"version = {offer.version}, the newest is {newest}"
    if offer.source >= offer.num_sources:
        return f"source = {offer.source} of {offer.num_sources}"
    return ""


_ROLLOUT, _REWARD = frozenset({"rollout worker"}), frozenset({"reward worker"})
_SOURCE, _FIRST = frozenset({"weight source"}), frozenset({"first trainer rank"})
RULES: dict[type[Message], Rule] = {
    messages.Heartbeat: Rule(_ROLLOUT | _REWARD | {"trainer"}),
    messages.Failed: Rule(_ROLLOUT | _REWARD),
    messages.Generated: Rule(_ROLLOUT),
    messages.PartialSample: Rule(_ROLLOUT),
    messages.GenerateFailed: Rule(_ROLLOUT),
    messages.ScoreRequest: Rule(_ROLLOUT, _score_requested),
    messages.ScoreResult: Rule(_REWARD),
    messages.GetBatch: Rule(frozenset({"leader"})),
    messages.StepDone: Rule(_FIRST, _step_done),
    messages.ProbeResult: Rule(_ROLLOUT),
    messages.CheckpointSaved: Rule(_FIRST, _checkpoint_saved),
    weight_messages.PublishOffer: Rule(_SOURCE, _publish_offer),
    weight_messages.GroupOpened: Rule(_SOURCE),
    weight_messages.GroupJoined: Rule(_SOURCE | _ROLLOUT),
    weight_messages.BucketsSent: Rule(_SOURCE),
    weight_messages.SnapshotWritten: Rule(_SOURCE),
    weight_messages.UpdateReady: Rule(_ROLLOUT),
    weight_messages.Updated: Rule(_ROLLOUT),
}


# ---- the ranges of FIELDS


def _number(low: int, high: int = LARGEST) -> Callable[[Any], bool]:
    return lambda value: low <= value <= high


def _matches(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: bool(pattern.fullmatch(value))


def _each(holds: Callable[[Any], bool], most: int = MAX_ENTRIES) -> Callable[[Any], bool]:
    return lambda value: len(value) <= most and all(map(holds, value))


def _by_name(
    pattern: re.Pattern[str], holds: Callable[[Any], bool], most: int = MAX_METRICS
) -> Callable[[Any], bool]:
    return lambda value: (
        len(value) <= most
        and all(pattern.fullmatch(name) and holds(entry) for name, entry in value.items())
    )


def _is_entry(value: Any) -> bool:
    """Accepts entries of a list: names of tensors, and structs with valid fields."""
    return bool(_TENSOR.fullmatch(value)) if isinstance(value, str) else not field_problem(value)


def _is_duration(value: float) -> bool:
    return 0 <= value < math.inf


def _is_anything(value: Any) -> bool:
    return True


def _is_probe(value: np.ndarray) -> bool:
    return value.dtype == np.float32 and len(value) <= MAX_PROBE_TOKENS


_COUNTS = (
    "version running tokens_generated num_interrupts num_interrupted peak_bytes num_bytes "
    "epoch group_id attempt index call source"
)
_UNRESTRICTED = (
    # checked against the others of the message or of the run
    "folder row reward turn_rewards "
    # of types that have no wrong values; the controller replaces `opening_tag`
    "backend flattened stop error response opening_tag text "
    # tokens, see controller/tokens.py
    "ids logprobs versions experts starts turn_starts text_ends"
)
_PHASES = _by_name(_PHASE, _is_duration)  # the names become names of metrics
FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_COUNTS.split(), _number(0)),
    **dict.fromkeys(_UNRESTRICTED.split(), _is_anything),
    "num_sources": _number(1, 1 << 16),
    "stage": _number(0, 1 << 16),
    "port": _number(1, 65535),
    "group": _matches(_GROUP),
    "address": _matches(_ADDRESS),
    "name": _matches(_TENSOR),  # of a tensor; of a file, see `files`
    "dtype": lambda dtype: dtype in ("float32", "bfloat16", "float16", "float8_e4m3fn"),
    "shape": _each(_number(0), most=16),
    "tensors": _each(_is_entry),
    "buckets": _each(_is_entry),
    "files": _each(lambda file: _is_entry(file) and bool(_FILE.fullmatch(file.name))),
    "sha256": _matches(_DIGEST),
    "digest_kind": _matches(_DIGEST),
    "digests": _by_name(_TENSOR, _matches(_DIGEST), MAX_ENTRIES),
    "seconds": lambda found: (_PHASES if isinstance(found, dict) else _is_duration)(found),
    "idle_s": _is_duration,
    "engine": _PHASES,
    "stats": _by_name(_METRIC, _is_anything),
    "probe_logprobs": _is_probe,
    "metrics": are_valid,
    "answer": lambda answer: len(answer) <= messages.MAX_ANSWER,
    "discount": lambda discount: 0 <= discount <= 1,
}


def field_problem(value: msgspec.Struct) -> str:
    """Returns the first field out of its range, by its name; empty if there is none."""
    for name in value.__struct_fields__:
        field = getattr(value, name)
        if isinstance(field, msgspec.Struct):
            if found := field_problem(field):
                return found
        elif not FIELDS[name](field):
            return f"{name} = {shown(field)}"
    return ""


def shown(value: Any) -> str:
    """Returns a short, printable text of a value that a worker sent."""
    try:
        return printable(ascii(value))
    except ValueError:  # of an integer with more than 4,300 digits
        return "a number of too many digits"


def printable(text: str) -> str:
    """Returns at most 200 printable characters: a log line must not contain another."""
    text = "".join(c if c.isprintable() else "?" for c in text[:201])
    return text if len(text) <= 200 else f"{text[:197]}..."
