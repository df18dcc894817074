"""Encodes messages as a msgpack header and one raw frame per array; nothing is pickled.

A long array of few runs, such as the versions or advantages of tokens, is run-length encoded: a
sample of 32k tokens takes 262 KB instead of 393, on the wire and in the journal.

SCHEMA, a digest of all message types, identifies incompatible package versions; read_unknown_hello
reads the Hello of another version well enough to refuse it by name.
"""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from megatron_async_rl.errors import ProtocolError
from megatron_async_rl.protocol import messages, weight_messages

AnyMessage = messages.RunMessage | weight_messages.WeightMessage
Frame = bytes | memoryview
_DTYPES = {name: np.dtype(name) for name in ("<i4", "<f4", "|u1", "<u2")}  # of elements
_RUNS = " runs"  # follows the element type of a run-length encoded array
_RUN_BYTES = 4  # per element of a run-length encoded array
_MIN_LENGTH, _MIN_MEAN_RUN = 256, 16  # of an array worth encoding
MAX_LENGTH = 1 << 24  # of a run-length array, decoded: a small frame must not become a huge one
MAX_DECODED_BYTES = 1 << 32  # of all run-length arrays of a message
_LOOK_AT = 64  # first elements, which rule out most arrays of many runs
ENCODING = 3  # increase when the frames change


class Codec:
    """Encodes and decodes messages, or another tagged union of structs. Not thread-safe.

    Run-length encoded arrays of a decoded message have at most `max_length` elements each and
    `max_decoded_bytes` bytes together; other arrays have the size that they have on the wire.
    """

    def __init__(
        self,
        kind: Any = AnyMessage,
        max_length: int = MAX_LENGTH,
        max_decoded_bytes: int = MAX_DECODED_BYTES,
    ) -> None:
        self._max_length = max_length
        self._max_decoded_bytes = max_decoded_bytes
        self._frames: list[Frame] = []
        self._num_read = 0
        self._num_decoded_bytes = 0
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._put_array)
        self._decoder = msgspec.msgpack.Decoder(kind, dec_hook=self._get_array)

    def encode(self, message: msgspec.Struct) -> list[Frame]:
        """Returns the msgpack header and one raw frame per array, in the header's order."""
        self._frames = []
        try:
            header = self._encoder.encode(message)
        except (UnicodeEncodeError, OverflowError) as e:
            raise ProtocolError(f"a {type(message).__name__} cannot be encoded: {e}") from None
        return [header, *self._frames]

    def decode(self, frames: Sequence[Frame]) -> Any:
        """Returns the message; its arrays are read-only views of the frames.

        Raises ProtocolError if anything is malformed.
        """
        self._frames, self._num_read, self._num_decoded_bytes = list(frames[1:]), 0, 0
        try:
            message = self._decoder.decode(frames[0])
            if self._num_read != len(frames) - 1:
                raise ValueError(f"the header names {self._num_read} arrays")
        except (msgspec.DecodeError, IndexError, ValueError, TypeError, RecursionError) as e:
            raise ProtocolError(f"a malformed message of {len(frames)} frames: {e}") from None
        finally:
            self._frames = []
        return message

    def _put_array(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype.str not in _DTYPES or value.ndim != 1:
            raise ProtocolError(
                f"cannot encode {type(value).__name__} {getattr(value, 'dtype', '')}; only 1-D "
                f"arrays of {', '.join(map(str, _DTYPES.values()))}"
            )
        runs = _as_runs(value) if value.itemsize == _RUN_BYTES else None
        if runs is not None:
            self._frames.append(runs.view(np.uint8).data)
            return (value.dtype.str + _RUNS, len(self._frames) - 1)
        self._frames.append(np.ascontiguousarray(value).view(np.uint8).data if value.size else b"")
        return (value.dtype.str, len(self._frames) - 1)

    def _get_array(self, kind: type, value: Any) -> Any:
        if kind is not np.ndarray:
            raise ProtocolError(f"no decoder for {kind}")
        dtype, index = value
        as_runs = str(dtype).endswith(_RUNS)
        dtype = str(dtype).removesuffix(_RUNS)
        if dtype not in _DTYPES or index != self._num_read:
            raise ValueError(
                f"array of type {dtype!r} in frame {index}, expected frame {self._num_read}"
            )
        self._num_read += 1
        frame = self._frames[index]
        if as_runs:
            if _DTYPES[dtype].itemsize != _RUN_BYTES:
                raise ValueError(f"runs of elements of type {dtype!r}")
            return self._from_runs(np.frombuffer(frame, "<i4"), _DTYPES[dtype])
        return np.frombuffer(frame, _DTYPES[dtype]) if len(frame) else np.empty(0, _DTYPES[dtype])

    def _from_runs(self, runs: np.ndarray, dtype: np.dtype) -> np.ndarray:
        values, lengths = runs[: len(runs) // 2], runs[len(runs) // 2 :]
        if len(runs) % 2 or (lengths < 1).any():
            raise ValueError(f"{len(runs)} numbers do not encode an array")
        length = int(lengths.sum(dtype=np.int64))
        if length > self._max_length:
            raise ValueError(f"an array of {length} elements, at most {self._max_length} can be")
        self._num_decoded_bytes += length * dtype.itemsize
        if self._num_decoded_bytes > self._max_decoded_bytes:
            raise ValueError(
                f"arrays of {self._num_decoded_bytes} bytes or more, at most "
                f"{self._max_decoded_bytes} can be"
            )
        array = np.repeat(values.view(dtype), lengths)
        array.flags.writeable = False  # like arrays that are views of frames
        return array


def _as_runs(array: np.ndarray) -> np.ndarray | None:
    """Returns [2 * num_runs] int32: the bits of each run's value, then the lengths of the runs.

    None if that is not much shorter.
    """
    if len(array) < _MIN_LENGTH:
        return None
    bits = np.ascontiguousarray(array).view("<i4")
    if np.count_nonzero(bits[1:_LOOK_AT] != bits[: _LOOK_AT - 1]) * _MIN_MEAN_RUN > _LOOK_AT:
        return None
    changes = bits[1:] != bits[:-1]
    num_changes = np.count_nonzero(changes)
    if not num_changes:
        return np.array([bits[0], len(bits)], "<i4")
    if (num_changes + 1) * _MIN_MEAN_RUN > len(bits):
        return None
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    return np.concatenate([bits[starts], np.diff(starts, append=len(bits))]).astype("<i4")


class Malformed(msgspec.Struct, frozen=True):
    """Stands for a message that could not be decoded."""

    reason: str


class UnknownHello(msgspec.Struct, frozen=True):
    """The fields that every version's Hello has; other fields are ignored."""

    type: typing.Literal["Hello"]
    name: str = "a worker"
    package: str = ""
    schema: str = ""


def read_unknown_hello(header: Frame) -> UnknownHello | None:
    """Returns the Hello of another package version; None if the header is no Hello."""
    try:
        return msgspec.msgpack.decode(header, type=UnknownHello)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def schema_of(kind: Any) -> str:
    """Returns a digest of a message type: names, fields, their types, and which are required."""
    structs: dict[str, str] = {}
    text = f"encoding {ENCODING}: {_describe(kind, structs)}"
    for name in sorted(structs):
        text += f"\n{name}: {structs[name]}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _describe(kind: Any, structs: dict[str, str]) -> str:
    """Describes a type independently of the Python version; adds its structs to `structs`."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {arguments}"
    if arguments:
        origin = getattr(typing.get_origin(kind), "__name__", "union")
        inner = ", ".join(_describe(argument, structs) for argument in arguments)
        return f"{'union' if 'nion' in origin else origin}[{inner}]"
    name = getattr(kind, "__name__", str(kind))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and name not in structs:
        structs[name] = ""  # it may contain itself
        hints = typing.get_type_hints(kind)
        fields = [
            (f.name, _describe(hints[f.name], structs), f.required)
            for f in msgspec.structs.fields(kind)
        ]
        structs[name] = f"{kind.__struct_config__.tag} {fields}"
    return name


SCHEMA = schema_of(AnyMessage)
