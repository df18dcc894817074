"""Messages as frames: a msgpack header and one raw frame per array. Nothing is ever pickled.

A long array of few runs, such as the version or the advantage of each token, travels as its runs: a trajectory of 32k
tokens is 262 KB instead of 393, on the wire and in the journal, and less to encrypt.

Also what tells two versions of the messages apart (SCHEMA), and what can be read of a Hello that is not of ours.
"""

from __future__ import annotations

import hashlib
import typing
from typing import Any

import msgspec
import numpy as np

from megatron_async_rl.errors import ProtocolError
from megatron_async_rl.protocol.messages import AnyMessage

Frame = bytes | memoryview
_DTYPES = {"<i4": np.dtype("<i4"), "<f4": np.dtype("<f4")}  # the only element types that travel
_RUNS = " runs"  # after the element type, of an array that travels as values and lengths
_MIN_LENGTH, _MIN_MEAN_RUN = 256, 16  # of an array that is worth it
_MAX_LENGTH = 1 << 24  # of an array that comes as runs: a small frame must not become a huge array
_LOOK_AT = 64  # elements that tell most arrays of many runs from those of few
ENCODING = 2  # to be raised when frames change


class Codec:
    """Messages (or another tagged union of structs) to frames and back. Not for use from two threads at once."""

    def __init__(self, kind: Any = AnyMessage) -> None:
        self._frames: list[Frame] = []
        self._num_read = 0
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._put_array)
        self._decoder = msgspec.msgpack.Decoder(kind, dec_hook=self._get_array)

    def encode(self, message: msgspec.Struct) -> list[Frame]:
        """Frames: msgpack header | one raw frame per array, in the order in which the header names them."""
        self._frames = []
        try:
            header = self._encoder.encode(message)
        except (UnicodeEncodeError, OverflowError) as e:
            raise ProtocolError(
                f"a {type(message).__name__} holds what cannot travel: {e}"
            ) from None
        return [header, *self._frames]

    def decode(self, frames: list[Frame]) -> Any:
        """The message; its arrays are read-only views of the frames. Raises ProtocolError on anything malformed."""
        self._frames, self._num_read = frames[1:], 0
        try:
            message = self._decoder.decode(frames[0])
            if self._num_read != len(frames) - 1:
                raise ValueError(f"the header names {self._num_read} arrays")
        except (msgspec.DecodeError, IndexError, ValueError, TypeError, RecursionError) as e:
            raise ProtocolError(f"malformed message of {len(frames)} frames: {e}") from None
        finally:
            self._frames = []
        return message

    def _put_array(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype.str not in _DTYPES or value.ndim != 1:
            raise ProtocolError(
                f"{type(value).__name__} {getattr(value, 'dtype', '')} does not travel; 1-D int32/float32 do"
            )
        runs = _as_runs(value)
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
            return _from_runs(np.frombuffer(frame, "<i4"), _DTYPES[dtype])
        return np.frombuffer(frame, _DTYPES[dtype]) if len(frame) else np.empty(0, _DTYPES[dtype])


def _as_runs(array: np.ndarray) -> np.ndarray | None:
    """[2 * num_runs] int32: the bits of each run's value, then the runs' lengths; None where that is not much shorter."""
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


def _from_runs(runs: np.ndarray, dtype: np.dtype) -> np.ndarray:
    values, lengths = runs[: len(runs) // 2], runs[len(runs) // 2 :]
    if len(runs) % 2 or (lengths < 1).any() or lengths.sum(dtype=np.int64) > _MAX_LENGTH:
        raise ValueError(f"{len(runs)} numbers are no runs of at most {_MAX_LENGTH} elements")
    array = np.repeat(values.view(dtype), lengths)
    array.flags.writeable = False  # as those are that came as they are
    return array


class UnknownHello(msgspec.Struct, frozen=True):
    """What any version's Hello says: enough to refuse it by name. Whatever else it has is not looked at."""

    type: typing.Literal["Hello"]
    name: str = "a worker"
    package: str = ""
    schema: str = ""


def read_unknown_hello(header: Frame) -> UnknownHello | None:
    """A Hello of other messages than ours; None when it is no Hello at all."""
    try:
        return msgspec.msgpack.decode(header, type=UnknownHello)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def schema_of(kind: Any) -> str:
    """A digest of a type as it travels: names, fields, their types and which of them may be left out."""
    structs: dict[str, str] = {}
    text = f"encoding {ENCODING}: {_describe(kind, structs)}"
    for name in sorted(structs):
        text += f"\n{name}: {structs[name]}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _describe(kind: Any, structs: dict[str, str]) -> str:
    """The type in words that no Python version changes; structs that it is made of are added to `structs`."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {arguments}"
    if arguments:
        origin = getattr(typing.get_origin(kind), "__name__", "union")
        return f"{'union' if 'nion' in origin else origin}[{', '.join(_describe(a, structs) for a in arguments)}]"
    name = getattr(kind, "__name__", str(kind))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and name not in structs:
        structs[name] = ""  # it may hold itself
        hints = typing.get_type_hints(kind)
        fields = [
            (f.name, _describe(hints[f.name], structs), f.required)
            for f in msgspec.structs.fields(kind)
        ]
        structs[name] = f"{kind.__struct_config__.tag} {fields}"
    return name


SCHEMA = schema_of(AnyMessage)
