"""Every message survives encoding and decoding; malformed data is rejected."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types
import typing
from typing import Any, get_args, get_origin

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_async_rl.errors import ProtocolError
from megatron_async_rl.protocol import messages, weight_messages
from megatron_async_rl.protocol.messages import ScoreRequest, TrainBatch
from megatron_async_rl.protocol.types import SampleKey, TrainSample
from megatron_async_rl.protocol.wire import (
    SCHEMA,
    AnyMessage,
    Codec,
    Frame,
    read_unknown_hello,
    schema_of,
)

MESSAGES = get_args(AnyMessage)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)  # no lone surrogates
INTS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False)
JSON = st.recursive(
    st.none() | st.booleans() | INTS | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
ARRAYS = st.one_of(
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5).map(
        lambda values: np.array(values, np.int32)
    ),
    st.lists(st.floats(width=32), max_size=5).map(lambda values: np.array(values, np.float32)),
)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Returns a strategy for the values of a field of this type."""
    simple = {
        int: INTS,
        float: FLOATS,
        str: TEXT,
        bool: st.booleans(),
        Any: JSON,
        np.ndarray: ARRAYS,
        type(None): st.none(),
    }
    if kind in simple:
        return simple[kind]
    origin, args = get_origin(kind), get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is list:
        return st.lists(values_of(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values_of(args[0]), values_of(args[1]), max_size=3)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(arg) for arg in args])
    assert issubclass(kind, msgspec.Struct), f"no values for {kind}"
    return structs_of(kind)


@functools.cache
def structs_of(kind: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    return st.builds(
        kind, **{field.name: values_of(hints[field.name]) for field in msgspec.structs.fields(kind)}
    )


def plain(value: Any) -> Any:
    """Makes values comparable: an array becomes its type and bytes, so that NaN equals itself."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, msgspec.Struct):
        return (
            type(value),
            {name: plain(getattr(value, name)) for name in value.__struct_fields__},
        )
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def received(frames: list[Frame]) -> list[bytes]:
    return [bytes(frame) for frame in frames]


def a_score(row: Any = None) -> ScoreRequest:
    return ScoreRequest(SampleKey(1, 2, 0, 3), "42", {"answer": "42"} if row is None else row)


def a_batch() -> TrainBatch:
    samples = [
        TrainSample(
            ids=np.arange(n, dtype=np.int32),
            logprobs=np.zeros(n, np.float32),
            versions=np.full(n, 7, np.int32),
            advantages=np.ones(n, np.float32),
            experts=np.arange(6 * n, dtype=np.uint16),
        )
        for n in (3, 5)
    ]
    return TrainBatch(version=8, samples=samples)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_survives_encoding(kind: type) -> None:
    codec = Codec()

    @settings(
        max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(structs_of(kind))
    def arrives(message: Any) -> None:
        assert plain(codec.decode(received(codec.encode(message)))) == plain(message)

    arrives()


def test_every_message_class_is_covered() -> None:
    classes = {
        kind
        for kind in [*vars(messages).values(), *vars(weight_messages).values()]
        if isinstance(kind, type) and issubclass(kind, messages.Message)
    }
    assert classes - {messages.Message} == set(MESSAGES)


def test_received_array_is_read_only() -> None:
    codec = Codec()
    batch = codec.decode(received(codec.encode(a_batch())))
    assert isinstance(batch, TrainBatch)
    with pytest.raises(ValueError, match="read-only"):
        batch.samples[0].ids[0] = 1


LONG_ARRAYS = {
    "constant": np.full(30_000, 7, np.int32),
    "prompt and two versions": np.repeat(np.array([-1, 3, 4], np.int32), [500, 20_000, 9_500]),
    "one run and then noise": np.concatenate(
        [np.zeros(500), np.random.default_rng(0).random(30_000)]
    ).astype(np.float32),
    "noise and then one run": np.concatenate(
        [np.random.default_rng(0).random(80), np.zeros(30_000)]
    ).astype(np.float32),
    "not a number, and zeros of both signs": np.repeat(
        np.array([np.nan, 0.0, -0.0, np.inf], np.float32), 1000
    ),
    "a run every 17": np.repeat(np.arange(1000, dtype=np.int32), 17),
    "a run every 15": np.repeat(np.arange(1000, dtype=np.int32), 15),
    "strided": np.repeat(np.arange(100, dtype=np.int32), 200)[::2],
    "extremes": np.repeat(np.array([-(2**31), 2**31 - 1], np.int32), 600),
}


@pytest.mark.parametrize("name", LONG_ARRAYS)
def test_long_arrays_survive_encoding_exactly(name: str) -> None:
    array = LONG_ARRAYS[name]
    sample = TrainSample(ids=array, logprobs=array[:0], versions=array[:300], advantages=array)
    frames = received(Codec().encode(TrainBatch(1, [sample])))
    batch = Codec().decode(frames)
    got = batch.samples[0]
    for mine, theirs in ((got.ids, array), (got.versions, array[:300]), (got.advantages, array)):
        assert mine.dtype == theirs.dtype and mine.tobytes() == theirs.tobytes()
    assert not got.ids.flags.writeable
    if name in ("constant", "prompt and two versions", "extremes"):
        assert len(frames[1]) <= 24  # as runs


@given(st.lists(st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(1, 400)), max_size=40))
def test_run_length_encoding_is_lossless(runs: list[tuple[int, int]]) -> None:
    values, lengths = np.array(runs, np.int64).reshape(-1, 2).T
    array = np.repeat(values.astype(np.int32), lengths)
    sample = TrainSample(array, array.view(np.float32), array, array.view(np.float32))
    got = Codec().decode(received(Codec().encode(TrainBatch(1, [sample])))).samples[0]
    assert got.ids.tobytes() == got.logprobs.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "runs", [[7], [7, 8, 9], [7, 0], [7, -1], [7, 8, 1 << 30, 1 << 30], [7, (1 << 24) + 1]]
)
def test_invalid_or_huge_runs_are_rejected(runs: list[int]) -> None:
    frames = received(
        Codec().encode(TrainBatch(1, [TrainSample(*[np.full(1000, 7, np.int32)] * 4)]))
    )
    frames[1] = np.array(runs, np.int32).tobytes()
    with pytest.raises(ProtocolError, match="malformed"):
        Codec().decode(frames)


def test_small_message_does_not_become_a_large_one() -> None:
    """169 bytes on the wire were 288 MiB in memory."""
    length = 1 << 12
    array = np.zeros(length, np.int32)
    sample = TrainSample(array, array.astype(np.float32), array, array.astype(np.float32))
    frames = received(Codec().encode(TrainBatch(1, [sample])))
    assert sum(map(len, frames)) < 256
    at_the_limit = Codec(max_length=length, max_decoded_bytes=4 * 4 * length)
    assert len(at_the_limit.decode(frames).samples[0].ids) == length
    assert len(at_the_limit.decode(frames).samples[0].ids) == length  # counted for each message
    with pytest.raises(ProtocolError, match=f"an array of {length} elements, at most"):
        Codec(max_length=length - 1).decode(frames)
    with pytest.raises(ProtocolError, match=f"at most {4 * 4 * length - 1} can be"):
        Codec(max_decoded_bytes=4 * 4 * length - 1).decode(frames)
    many = received(Codec().encode(TrainBatch(1, [sample] * 100)))
    with pytest.raises(ProtocolError, match="at most"):
        at_the_limit.decode(many)


def test_strided_array_is_sent_by_value() -> None:
    codec = Codec()
    sample = TrainSample(
        ids=np.arange(10, dtype=np.int32)[::2],
        logprobs=np.zeros(5, np.float32),
        versions=np.zeros(5, np.int32),
        advantages=np.zeros(5, np.float32),
    )
    batch = codec.decode(received(codec.encode(TrainBatch(version=0, samples=[sample]))))
    assert isinstance(batch, TrainBatch)
    assert batch.samples[0].ids.tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    "array",
    [np.zeros(2, np.int64), np.zeros((2, 2), np.float32), np.array(["a"]), np.array([None])],
)
def test_array_of_unsupported_type_or_shape_is_not_sent(array: np.ndarray) -> None:
    sample = TrainSample(ids=array, logprobs=array, versions=array, advantages=array)
    with pytest.raises(ProtocolError, match="cannot encode"):
        Codec().encode(TrainBatch(version=0, samples=[sample]))


def header(message: messages.Message) -> dict[str, Any]:
    return msgspec.msgpack.decode(bytes(Codec().encode(message)[0]))


def packed(fields: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode(fields)


BATCH = received(Codec().encode(a_batch()))
MALFORMED = {
    "no frames": [],
    "empty header": [b""],
    "truncated header": [BATCH[0][:-3], *BATCH[1:]],
    "bytes after the header": [BATCH[0] + b"\x00", *BATCH[1:]],
    "missing array": BATCH[:-1],
    "truncated array": [*BATCH[:-1], BATCH[-1][:-1]],
    "pickle": [b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."],
    "text": [b"hello"],
    "unknown field": [packed({**header(a_score()), "extra": 1})],
    "missing field": [packed({name: v for name, v in header(a_score()).items() if name != "key"})],
    "unknown message": [packed({**header(a_score()), "type": "Execute"})],
    "no type": [packed({"response": "42"})],
    "wrong type": [packed({**header(a_score()), "call": "1"})],
    "number for text": [packed({**header(a_score()), "response": 5})],
    "float for number": [packed({**header(a_score()), "call": 1.5})],
    "not UTF-8": [packed(header(a_score())).replace(b"answer", b"\xff\xff\xff\xff\xff\xff")],
}
SAMPLE = {
    "ids": ("<i4", 0),
    "logprobs": ("<f4", 1),
    "versions": ("<i4", 2),
    "advantages": ("<f4", 3),
    "experts": ("<u2", 4),
}
for name, array in {
    "array of 64-bit numbers": ("<i8", 0),
    "array of objects": ("|O", 0),
    "array in a frame that is not there": ("<i4", 99),
    "array in a negative frame": ("<i4", -1),
    "array without frame": ("<i4",),
    "array frame of a strange type": ("<i4", "0"),
    "array of a strange type": ([], 0),
    "array inline": [1, 2, 3],
    "array null": None,
}.items():
    fields = {"type": "TrainBatch", "version": 1, "samples": [{**SAMPLE, "ids": array}]}
    MALFORMED[name] = [packed(fields), *BATCH[1:6]]
fields = {"type": "TrainBatch", "version": 1, "samples": [SAMPLE | {"experts": ("<u2 runs", 4)}]}
MALFORMED["runs of small numbers"] = [packed(fields), *BATCH[1:6]]


@pytest.mark.parametrize("frames", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_message_is_rejected(frames: list[bytes]) -> None:
    codec = Codec()
    with pytest.raises(ProtocolError):
        codec.decode(frames)
    assert plain(codec.decode(BATCH)) == plain(a_batch())  # no state is left behind


def test_unreferenced_frames_are_rejected() -> None:
    with pytest.raises(ProtocolError):
        Codec().decode([*BATCH, b"\x00\x00\x00\x00"])


@pytest.mark.parametrize("opening", [b"\x81\xa1a", b"\x91"], ids=["maps", "lists"])
def test_deeply_nested_header_is_rejected(opening: bytes) -> None:
    nested = (
        packed({**header(a_score()), "row": 0})[:-1] + b"\x81\xa1a" + opening * 100_000 + b"\xc0"
    )
    with pytest.raises(ProtocolError):
        Codec().decode([nested])


@pytest.mark.parametrize(
    "answer", ["\ud800", 10**30], ids=["lone surrogate", "number beyond 64 bits"]
)
def test_row_that_cannot_be_encoded_is_rejected_by_name(answer: Any) -> None:
    with pytest.raises(ProtocolError):
        Codec().encode(a_score({"answer": answer}))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, len(BATCH) - 1), st.data())
def test_flipped_bytes_are_rejected_or_decode_to_a_message(frame: int, data: st.DataObject) -> None:
    damaged = bytearray(BATCH[frame])
    for _ in range(3):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = Codec().decode([*BATCH[:frame], bytes(damaged), *BATCH[frame + 1 :]])
    except ProtocolError:
        return
    assert isinstance(message, messages.Message)


class Told(messages.Message, frozen=True, tag="Told"):
    version: int
    sample: TrainSample
    error: str = ""


@pytest.mark.parametrize(
    "fields",
    [
        [("version", int), ("sample", TrainSample), ("error", str)],  # required fields
        [("version", int), ("sample", TrainSample), ("error", str, ""), ("more", int, 0)],
        [("version", int), ("sample", TrainSample)],
        [("version", float), ("sample", TrainSample), ("error", str, "")],
        [("version", int), ("sample", TrainSample | None), ("error", str, "")],
        [("version", int), ("sample", weight_messages.Bucket), ("error", str, "")],
        [("number", int), ("sample", TrainSample), ("error", str, "")],
    ],
)
def test_any_change_to_a_message_changes_the_schema(fields: list[tuple]) -> None:
    changed = msgspec.defstruct(
        "Told", fields, bases=(messages.Message,), tag="Told", frozen=True, module=__name__
    )
    assert schema_of(changed) != schema_of(Told)


def test_change_in_a_nested_struct_changes_the_schema() -> None:
    inner = msgspec.defstruct(
        "TrainSample", [(f.name, f.type) for f in msgspec.structs.fields(TrainSample)][:-1]
    )
    fields = [("version", int), ("sample", inner), ("error", str, "")]
    changed = msgspec.defstruct("Told", fields, bases=(messages.Message,), tag="Told", frozen=True)
    assert schema_of(changed) != schema_of(Told)


def test_schema_is_equal_in_every_process() -> None:
    program = "from megatron_async_rl.protocol.wire import SCHEMA; print(SCHEMA)"
    seeds = ("0", "1")  # of string hashes, which order sets
    answers = [
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in seeds
    ]
    assert answers == [f"{SCHEMA}\n"] * 2


def test_hello_of_another_version_yields_name_and_versions_only() -> None:
    old = {"type": "Hello", "role": "rollout", "name": "rollout-0", "protocol": 1, "shoes": [1, 2]}
    stranger = read_unknown_hello(msgspec.msgpack.encode(old))
    assert stranger is not None and (stranger.name, stranger.package, stranger.schema) == (
        "rollout-0",
        "",
        "",
    )
    for other in (
        {"type": "Heartbeat", "name": "x"},
        {"name": "x"},
        [1],
        "Hello",
        {"type": "Hello", "name": 1},
    ):
        assert read_unknown_hello(msgspec.msgpack.encode(other)) is None
    assert read_unknown_hello(b"\x80\x04\x95.") is None
