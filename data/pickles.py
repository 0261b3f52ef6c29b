"""Arrays out of pickles that come from elsewhere; nothing that a pickle asks for is ever called.

A pickle is a program: it names functions and calls them. Here the few names that NumPy arrays,
dtypes and scalars need lead to inert stand-ins of ours, which only note what they are given; every
other name ends the reading. Real arrays are made of the notes afterwards, from plain types and raw
bytes: NumPy's own `__setstate__` trusts what it is given and can be led to wrong memory.
"""

import pickle
import re
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.schema import DataError

MAX_BYTES = 16 << 30
"""Largest file that is read, as it has to fit into memory; unaligned MOSEI, the largest published
one, has about 9 GB in float32."""

_SIMPLE = (str, bytes, bool, int, float, complex, type(None))
_CODE = re.compile(r"[?biufcSU][0-9]{0,9}")
_REASONS: dict[type[Exception], str] = {EOFError: "it breaks off", KeyError: "it is no pickle"}
_SAFE_FORM = (
    "only dict, list, str, bytes, numbers and NumPy arrays of them are read; if you trust the "
    "file, load it yourself, save its arrays with numpy.savez and give the npz"
)


class _Inert:
    """Stand-in for a global. It has a `__setstate__`, since a pickle may set any attribute of an
    object without one, and is a class, so that the same holds for the stand-in itself."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets the state of something that has none")


class _Bytes(_Inert):
    """`_codecs.encode(text, "latin1")` or `bytes()`: bytes of Python 3 in old protocols."""

    def __new__(cls, text: str = "", encoding: str = "latin1") -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"it encodes bytes as {encoding!r}, not latin1")
        return bytes(text, "latin1")


class _Dtype(_Inert):
    """`numpy.dtype(code, align, copy)`, then its state: (version, byte order, parts, ...)."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.byte_order = "="

    def __setstate__(self, state: Any) -> None:
        self.byte_order = str(state[1])

    @property
    def is_object(self) -> bool:
        return self.code.startswith("O")

    def dtype(self) -> np.dtype:
        """Raises: UnpicklingError: a structure, a date or another type that is not plain."""
        if not _CODE.fullmatch(self.code):
            raise pickle.UnpicklingError(f"it holds an array of type {self.code[:40]!r}")
        return np.dtype(self.code).newbyteorder(self.byte_order)  # type: ignore[arg-type]


class _Array(_Inert):
    """`_reconstruct(ndarray, (0,), b"b")`, then its state."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self, done: dict[int, object]) -> np.ndarray:
        _, shape, dtype, is_fortran, data = self.state
        order = "F" if is_fortran else "C"
        if dtype.is_object:
            elements = (_plain(element, done) for element in data)
            return np.fromiter(elements, object, len(data)).reshape(shape, order=order)
        return _numbers(data, dtype).reshape(shape, order=order)


class _Buffer(_Inert):
    """`_frombuffer(data, dtype, shape, order, axis_order)`: arrays of protocol 5."""

    def __init__(
        self,
        data: bytes,
        dtype: _Dtype,
        shape: tuple[int, ...],
        order: str,
        axis_order: tuple[int, ...] | None = None,
    ) -> None:
        self.data, self.dtype, self.shape = data, dtype, shape
        self.order, self.axis_order = order, axis_order

    def array(self, _: dict[int, object]) -> np.ndarray:
        flat = _numbers(self.data, self.dtype)
        if self.order == "K" and self.axis_order is not None:
            return flat.reshape(self.shape).transpose(self.axis_order)
        return flat.reshape(self.shape, order=self.order)  # type: ignore[call-overload]


class _Scalar(_Inert):
    """`scalar(dtype, data)`."""

    def __init__(self, dtype: _Dtype, data: bytes) -> None:
        self.dtype, self.data = dtype, data

    def array(self, _: dict[int, object]) -> np.generic:
        return _numbers(self.data, self.dtype)[0]


def _numpy(module: str, name: str, stand_in: type) -> dict[tuple[str, str], type]:
    """Names of one thing: NumPy 2 moved `numpy.core` to `numpy._core`."""
    return {(f"numpy.{core}.{module}", name): stand_in for core in ("core", "_core")}


_GLOBALS: dict[tuple[str, str], type] = {
    ("_codecs", "encode"): _Bytes,
    ("__builtin__", "bytes"): _Bytes,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    **_numpy("multiarray", "_reconstruct", _Array),
    **_numpy("multiarray", "scalar", _Scalar),
    **_numpy("numeric", "_frombuffer", _Buffer),
}


class _Unpickler(pickle._Unpickler):
    """The unpickler in Python: that in C makes a memo as long as the largest number in the file,
    so nine bytes take gigabytes."""

    # A bytearray is read as bytes, since it would be made before it is known to be in the file.
    dispatch = pickle._Unpickler.dispatch | {
        pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]]
    }

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding="latin1")  # strings of Python 2, which are bytes
        self._path = path

    def find_class(self, module: str, name: str) -> type:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            asked = f"{module}.{name}"[:100]
            raise DataError(
                f"{self._path} asks for {asked!r}, which no plain array needs and which could run "
                f"anything; it was not called; {_SAFE_FORM}"
            ) from None


def read_arrays(path: Path) -> object:
    """What a pickle holds: dict, list and tuple of NumPy arrays and scalars, str, bytes, numbers.

    Written by Python 2 or 3 in any protocol, by NumPy 1 or 2. Arrays of objects are read if their
    elements are plain. Arrays may be read-only. Strings of Python 2 are read as latin1.

    Args:
        path: the file, from any source.

    Raises:
        DataError: the file is larger than `MAX_BYTES`, truncated or no pickle, or it asks for
            anything else; the message has the name.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DataError(
            f"{path} has {size} bytes and at most {MAX_BYTES} are read, since a pickle has to fit "
            "into memory; save its arrays with numpy.savez, one npz per split"
        )
    try:
        with path.open("rb") as file:
            return _plain(_Unpickler(file, path).load(), {})
    except DataError:
        raise
    except Exception as error:  # a broken pickle raises nearly anything
        reason = _REASONS.get(type(error)) or str(error) or type(error).__name__
        raise DataError(
            f"{path} cannot be read as a pickle of arrays ({reason[:200]}); get the file again; "
            f"{_SAFE_FORM}"
        ) from error


_UNFINISHED = object()


def _plain(value: object, done: dict[int, object]) -> object:
    """`value` with arrays in place of their stand-ins.

    Args:
        done: results by id, so that what is shared is made once, and what holds itself is found.
    """
    if isinstance(value, _SIMPLE):
        return value
    if id(value) not in done:
        done[id(value)] = _UNFINISHED
        done[id(value)] = _made(value, done)
    if done[id(value)] is _UNFINISHED:
        raise pickle.UnpicklingError("it holds something that holds itself")
    return done[id(value)]


def _made(value: object, done: dict[int, object]) -> object:
    match value:
        case _Array() | _Buffer() | _Scalar():
            return value.array(done)
        case dict():
            return {_plain(key, done): _plain(item, done) for key, item in value.items()}
        case list():
            return [_plain(item, done) for item in value]
        case tuple():
            return tuple(_plain(item, done) for item in value)
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__.strip('_')}")


def _numbers(data: str | bytes, dtype: _Dtype) -> np.ndarray:
    """Flat array over raw bytes; Python 2 wrote them as str."""
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype.dtype())
