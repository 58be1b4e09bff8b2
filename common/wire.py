"""Messages to frames and back: how the records of common/types.py travel.

A message travels as one ZeroMQ frame, so that the library's limit on frames (MAXMSGSIZE) bounds it. In it lie our own
frames: their number and lengths as little-endian uint32, then each of them, filled up to a multiple of 8 bytes.

Frame 0 is a MessagePack header, the others are the message's arrays in little-endian byte order, not copied:

    [kind, protocol version, {field: value}, [[array field, dtype, shape], ...]], array bytes, ...

`decode` trusts nothing: whatever bytes arrive, the result is a message whose every field has the type that
its dataclass declares, or a WireError. There is no pickle; no type travels but those that messages declare.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, NoReturn, TypeAlias, Union, cast, get_args, get_origin, get_type_hints

import msgpack
import numpy as np
import numpy.typing as npt

from common.fields import ArraySpec, Length, Range
from common.types import PROTOCOL_VERSION, Message

Frame: TypeAlias = bytes | bytearray | memoryview
Check: TypeAlias = Callable[[Any, str], Any]  # (value, name of its field): the value as its type wants it, or WireError

MAX_HEADER_BYTES = 4 << 20  # a row with its test cases, or the names and shapes of a large model's tensors
MAX_JSON_DEPTH = 16
MAX_FRAMES = 64
ALIGNMENT = 8  # bytes
MAX_PACKING_BYTES = 1 << 10  # more than `pack` adds: a length and a filling for each of MAX_FRAMES
_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}


class WireError(ValueError):
    """Bytes that are no message of this protocol, or a message that cannot travel: which field, and why."""


def pack(frames: Sequence[Frame]) -> bytes:
    """The frames as one."""
    lengths = np.array([len(frames), *map(len, frames)], "<u4").tobytes()
    parts: list[Frame] = []
    for part in (lengths, *frames):
        parts += (part, bytes(-len(part) % ALIGNMENT))
    return b"".join(parts)


def unpack(packed: Frame) -> list[memoryview]:
    """Views on the frames in it. Raises WireError when they do not fill it."""
    view = memoryview(packed)
    num_frames = int.from_bytes(view[:4], "little")
    if len(view) < 4 or num_frames > MAX_FRAMES or len(view) < 4 + 4 * num_frames:
        raise WireError(f"{len(view)} bytes that begin with the number {num_frames} are no frames")
    start, frames = _aligned(4 + 4 * num_frames), []
    for i in range(num_frames):
        end = start + int.from_bytes(view[4 + 4 * i : 8 + 4 * i], "little")
        frames.append(view[start:end])
        start = _aligned(end)
    if start != len(view):
        raise WireError(f"{num_frames} frames that take {start} bytes in {len(view)}")
    return frames


def _aligned(length: int) -> int:
    return length + -length % ALIGNMENT


@dataclass(frozen=True)
class _Schema:
    """A message class as the wire sees it: checks of the header's fields, specs of the array fields."""

    plain: dict[str, Check]
    arrays: dict[str, ArraySpec]


def _schema(kind: type) -> _Schema:
    hints = get_type_hints(kind, include_extras=True)
    schema = _Schema({}, {})
    for field in fields(kind):
        hint = hints[field.name]
        if get_origin(hint) is Annotated and isinstance(spec := get_args(hint)[1], ArraySpec):
            schema.arrays[field.name] = spec
        else:
            schema.plain[field.name] = _check_of(hint)
    return schema


def encode(message: Message) -> list[Frame]:
    """Header and array frames; the array frames are views, so the arrays must not change afterwards.

    Raises WireError for a value that `decode` on the other side would not accept.
    """
    kind = type(message).__name__
    schema = _SCHEMAS[kind]
    plain = {name: check(getattr(message, name), f"{kind}.{name}") for name, check in schema.plain.items()}
    specs, frames = [], []
    for name, spec in schema.arrays.items():
        array = getattr(message, name)
        if not isinstance(array, np.ndarray) or array.dtype != spec.dtype or array.ndim != spec.ndim:
            raise WireError(f"{kind}.{name} must be {spec.dtype} of {spec.ndim} dimension, not {_describe(array)}")
        specs.append([name, spec.dtype, list(array.shape)])
        frames.append(_bytes_of(np.ascontiguousarray(array, _little_endian(spec.dtype))))
    try:
        header = cast(bytes, msgpack.packb([kind, PROTOCOL_VERSION, plain, specs]))
    except (ValueError, TypeError) as error:  # e.g. a lone surrogate in a string
        raise WireError(f"{kind} cannot be written as MessagePack: {error}") from error
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"{kind} has a header of {len(header)} bytes, over the limit of {MAX_HEADER_BYTES}")
    return [header, *frames]


def decode(frames: Sequence[Frame], max_bytes: int) -> Message:
    """The message in these frames; its arrays are read-only views on them. Raises WireError, nothing else."""
    if not frames:
        raise WireError("an empty message")
    size = sum(len(frame) for frame in frames)
    if size > max_bytes or len(frames[0]) > MAX_HEADER_BYTES:
        raise WireError(
            f"a message of {size} bytes with a header of {len(frames[0])} bytes: the limits are {max_bytes} "
            f"and {MAX_HEADER_BYTES}"
        )
    kind, plain, specs = _header(frames[0])
    schema = _SCHEMAS[kind.__name__]
    _check_names(kind.__name__, plain, set(schema.plain))
    values: dict[str, Any] = {
        name: check(plain[name], f"{kind.__name__}.{name}") for name, check in schema.plain.items()
    }
    values.update(_arrays(kind.__name__, schema.arrays, specs, frames[1:]))
    try:
        return kind(**values)
    except ValueError as error:  # the record's own check
        raise WireError(str(error)) from error


def _header(frame: Frame) -> tuple[type[Message], dict[str, Any], list[Any]]:
    try:
        header = msgpack.unpackb(frame)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise WireError(f"the header is not MessagePack: {_first_line(error)}") from error
    if type(header) is not list or len(header) < 2:
        raise WireError(f"the header is {_describe(header)}, not [kind, version, fields, arrays]")
    if type(header[1]) is not int or header[1] != PROTOCOL_VERSION:
        raise WireError(f"protocol version {_describe(header[1])}, but this side speaks {PROTOCOL_VERSION}")
    if len(header) != 4 or type(header[2]) is not dict or type(header[3]) is not list:
        raise WireError("the header is not [kind, version, fields, arrays]")
    kind = _KINDS.get(header[0]) if type(header[0]) is str else None
    if kind is None:
        raise WireError(f"unknown kind of message: {_describe(header[0])}")
    return kind, header[2], header[3]


def _check_names(kind: str, given: dict[Any, Any], wanted: set[str]) -> None:
    if set(given) != wanted:
        missing = sorted(wanted - set(given))
        extra = sorted(map(_describe, set(given) - wanted))
        raise WireError(f"{kind} lacks the fields {missing} and has the unknown fields {extra[:8]}")


def _arrays(kind: str, wanted: dict[str, ArraySpec], specs: list[Any], frames: Sequence[Frame]) -> dict[str, Any]:
    if len(specs) != len(wanted) or len(frames) != len(wanted):
        raise WireError(f"{kind} has {len(wanted)} arrays, not {len(specs)} specs and {len(frames)} frames")
    arrays = {}
    for (name, spec), given, frame in zip(wanted.items(), specs, frames, strict=True):
        if type(given) is not list or len(given) != 3 or given[:2] != [name, spec.dtype]:
            raise WireError(f"{kind}.{name} must be announced as {spec.dtype}, not {_describe(given)}")
        shape = given[2]
        if type(shape) is not list or len(shape) != spec.ndim or not all(map(_is_length, shape)):
            raise WireError(f"{kind}.{name} must have {spec.ndim} dimension, not {_describe(shape)}")
        dtype = _little_endian(spec.dtype)
        if math.prod(shape) * dtype.itemsize != len(frame):
            raise WireError(f"{kind}.{name} of shape {shape} does not fit its frame of {len(frame)} bytes")
        array = np.frombuffer(frame, dtype).reshape(shape)
        array = array if array.flags.aligned else array.copy()  # small ZeroMQ frames may lie at any address
        array.flags.writeable = False
        arrays[name] = array
    return arrays


def _is_length(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_of(hint: Any) -> Check:
    """The check of one type, made once: hints are looked at when a class is first known, not for each message."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return _check_any
    if origin is Annotated:
        return _limited(_check_of(args[0]), args[1])
    if origin in (Union, UnionType):  # X | None is the only union in use
        (inner,) = (_check_of(arg) for arg in args if arg is not NoneType)
        return lambda value, where: None if value is None else inner(value, where)
    if origin is tuple:
        item = _check_of(args[0])
        return lambda value, where: tuple(item(one, where) for one in _of(list | tuple, hint, value, where))
    if origin is dict:
        item = _check_of(args[1])
        return lambda value, where: {
            key: item(one, _place(where, key)) for key, one in _of(dict, hint, value, where).items()
        }
    if issubclass(hint, StrEnum):
        members: dict[Any, StrEnum] = {member.value: member for member in hint}
        return lambda value, where: members.get(_of(str, hint, value, where)) or _refuse(hint, value, where)
    return {str: _check_str, bool: _check_bool, int: _check_int, float: _check_float}[hint]


def _limited(check: Check, limit: Range | Length) -> Check:
    if isinstance(limit, Length):
        return lambda value, where: _cut(check(value, where), limit.most)

    def in_range(value: Any, where: str) -> Any:
        number = check(value, where)
        if not limit.lowest <= number <= limit.highest:
            raise WireError(f"{where} must be from {limit.lowest:g} to {limit.highest:g}, not {number:g}")
        return number

    return in_range


def _cut(text: str, most: int) -> str:
    """Its beginning, and what UTF-8 cannot write replaced: whatever an exception says, it travels."""
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text.encode(errors="replace").decode()


def _check_any(value: Any, where: str) -> Any:
    _check_json(value, where, MAX_JSON_DEPTH)
    return value


def _check_str(value: Any, where: str) -> str:
    return value if type(value) is str else _refuse(str, value, where)


def _check_bool(value: Any, where: str) -> bool:
    return value if type(value) is bool else _refuse(bool, value, where)


def _check_int(value: Any, where: str) -> int:
    """NumPy's integers are converted."""
    is_number = type(value) is int or isinstance(value, np.integer)
    return _int64(int(value), where) if is_number else _refuse(int, value, where)


def _check_float(value: Any, where: str) -> float:
    """Integers and NumPy's numbers are converted."""
    if type(value) not in (float, int) and not isinstance(value, np.number):
        _refuse(float, value, where)
    if not math.isfinite(value):
        raise WireError(f"{where} must be finite, not {value}")
    return float(value)


def _of(kind: Any, hint: Any, value: Any, where: str) -> Any:
    return value if isinstance(value, kind) else _refuse(hint, value, where)


def _refuse(hint: Any, value: Any, where: str) -> NoReturn:
    raise WireError(f"{where} must be {hint}, not {_describe(value)}")


def _check_json(value: Any, where: str, depth: int) -> None:
    """Only None, booleans, 64-bit integers, floats, strings, lists and dictionaries with string keys."""
    if value is None or type(value) in (bool, float, str):
        return
    if type(value) is int:
        _int64(value, where)
        return
    if depth == 0:
        raise WireError(f"{where} is nested deeper than {MAX_JSON_DEPTH} levels")
    if isinstance(value, list) or type(value) is tuple:
        for item in value:
            _check_json(item, where, depth - 1)
    elif type(value) is dict:
        for key, item in value.items():
            _check_json(item, _place(where, key), depth - 1)
    else:
        raise WireError(f"{where} holds {_describe(value)}, which is not a JSON value")


def _int64(value: int, where: str) -> int:
    if not -(1 << 63) <= value < 1 << 63:
        raise WireError(f"{where} holds the integer {_describe(value)}, which has more than 64 bits")
    return value


def _place(where: str, key: Any) -> str:
    if type(key) is not str:
        raise WireError(f"{where} has the key {_describe(key)}, which is not a string")
    return f"{where}[{_describe(key)}]"


@cache
def _little_endian(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def _bytes_of(array: npt.NDArray[Any]) -> Frame:
    # memoryview.cast refuses an empty array
    return array.data.cast("B") if array.size else b""


def _describe(value: Any) -> str:
    """A short text of any value for a message; never the whole of what a stranger sent."""
    text = f"{value!r}" if isinstance(value, str | bytes | int | float | NoneType) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


_SCHEMAS = {name: _schema(kind) for name, kind in _KINDS.items()}
