"""Restricted unpickling: what arrays need is read, whatever else a pickle asks for is refused.

Arrays are compared with those that were pickled; hostile pickles would leave a file behind.
"""

import builtins
import collections
import contextlib
import datetime
import os
import pickle
import resource
import struct
from pathlib import Path

import numpy as np
import numpy.ma
import pytest

from data import pickles
from data.pickles import read_arrays
from data.schema import DataError

ARRAYS = {
    "float32": np.arange(12, dtype=np.float32).reshape(1, 3, 4),
    "big endian": np.arange(5, dtype=">i4"),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "transposed": np.arange(6).reshape(1, 2, 3).transpose(2, 0, 1),
    "strided": np.arange(20.0)[::3],
    "empty": np.zeros((0, 50, 5), np.float32),
    "no dimension": np.array(2.5),
    "bool": np.array([True, False]),
    "bytes": np.array([[b"03bSnISJMiM"], [b"x"]]),
    "str": np.array(["03bSnISJMiM[0]", "ü"]),
    "no bytes": np.zeros((0, 3), "S11"),
    "objects": np.array([["a", b"b"], [1, None]], dtype=object),
}


def assert_same(found: object, expected: np.ndarray) -> None:
    assert isinstance(found, np.ndarray)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    shared = np.arange(3)
    inner = np.empty(2, dtype=object)
    inner[:] = [np.zeros((2, 3)), np.ones((4, 3))]  # ragged sequences
    whole = {
        "train": ARRAYS | {"ragged": inner},
        "ids": ["a$_$1", b"b", b""],
        "pair": (shared, shared),
        "numbers": [1, 2.5, None, True, 1 << 70],
        "scalar": np.float32(1.5),
    }
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps(whole, protocol))
    found = read_arrays(path)
    assert isinstance(found, dict)
    assert list(found) == list(whole)
    for name, expected in ARRAYS.items():
        assert_same(found["train"][name], expected)
    for ragged, expected in zip(found["train"]["ragged"], inner, strict=True):
        assert_same(ragged, expected)
    assert found["ids"] == whole["ids"]
    assert found["pair"][0] is found["pair"][1]
    assert found["numbers"] == whole["numbers"]
    assert found["scalar"] == np.float32(1.5)
    assert found["scalar"].dtype == np.float32


def test_numpy_1_names(tmp_path: Path) -> None:
    data = pickle.dumps(np.arange(4.0), protocol=2)
    assert b"numpy._core.multiarray" in data
    path = tmp_path / "old.pkl"
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert_same(read_arrays(path), np.arange(4.0))


def test_python_2(tmp_path: Path) -> None:
    """As Python 2.7 with NumPy 1.16 writes it: bytes as text, no `_codecs.encode`."""
    raw = np.array([0.5, -np.inf, 200.0], "<f8").tobytes()
    data = (
        b"\x80\x02}U\x05audioc" + b"numpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x03\x85cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U" + bytes([len(raw)]) + raw + b"tbs."
    )
    path = tmp_path / "python2.pkl"
    path.write_bytes(data)
    found = read_arrays(path)
    assert isinstance(found, dict)
    assert_same(found["audio"], np.array([0.5, -np.inf, 200.0]))


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:  # type: ignore[override]
        return self.call


def stack_global(module: str, name: str, argument: str) -> bytes:
    """Protocol 4 call of `module.name(argument)` with a dotted or otherwise unusual name."""
    texts = b"".join(
        b"\x8c" + bytes([len(text)]) + text for text in map(str.encode, (module, name))
    )
    word = argument.encode()
    return b"\x80\x04" + texts + b"\x93" + b"\x8c" + bytes([len(word)]) + word + b"\x85R."


def hostile(mark: str) -> dict[str, tuple[bytes, str]]:
    """Name -> pickle that would make the file `mark`, and the name that must be reported."""
    touch = f"touch {mark}"
    write = f"open({mark!r}, 'w')"
    hiding = np.empty(2, dtype=object)
    hiding[:] = ["plain", Calls(os.system, touch)]
    return {
        "os.system": (pickle.dumps(Calls(os.system, touch)), "posix.system"),
        "eval": (pickle.dumps(Calls(builtins.eval, write)), "builtins.eval"),
        "open": (pickle.dumps(Calls(builtins.open, mark, "w")), "_io.open|builtins.open|io.open"),
        "protocol 0": (b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.", "os.system"),
        "python 2": (b'c__builtin__\neval\n(S"' + write.encode() + b'"\ntR.', "__builtin__.eval"),
        "INST": (b"(S'" + touch.encode() + b"'\nios\nsystem\n.", "os.system"),
        "getattr": (stack_global("builtins", "getattr", touch), "builtins.getattr"),
        "dotted": (
            stack_global("numpy", "core.multiarray._reconstruct.__globals__", touch),
            "numpy.core.multiarray",
        ),
        "dotted dtype": (stack_global("numpy", "dtype.__init__", touch), "numpy.dtype.__init__"),
        "numpy runs programs": (
            stack_global("numpy.f2py.diagnose", "run_command", touch),
            "numpy.f2py.diagnose.run_command",
        ),
        "numpy loads": (stack_global("numpy", "load", mark), "numpy.load"),
        "numpy writes": (stack_global("numpy", "memmap", mark), "numpy.memmap"),
        "no name of the module": (stack_global("numpy._core.numeric", "dtype", mark), "numeric"),
        "in a dict": (pickle.dumps({"train": [Calls(os.system, touch)]}), "posix.system"),
        "in an object array": (pickle.dumps(hiding), "posix.system"),
        "as a state": (pickle.dumps(np.array(Calls(os.system, touch), object)), "posix.system"),
    }


@pytest.mark.parametrize("name", hostile("mark"))
def test_hostile(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    data, asked = hostile(str(mark))[name]
    path = tmp_path / "hostile.pkl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"asks for '.*({asked}).*not called.*numpy\.savez"):
        read_arrays(path)
    assert not mark.exists()


def test_the_hostile_pickles_would_work(tmp_path: Path) -> None:
    """Compared with plain `pickle.loads`, which runs them."""
    for number, name in enumerate(("os.system", "protocol 0", "INST", "in an object array")):
        mark = tmp_path / str(number)
        pickle.loads(hostile(str(mark))[name][0])
        assert mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        datetime.date(2024, 1, 1),
        collections.OrderedDict(a=1),
        np.ma.masked_array([1, 2], [False, True]),
        np.random.default_rng(0),
        Path("x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_types(tmp_path: Path, value: object) -> None:
    path = tmp_path / "other.pkl"
    path.write_bytes(pickle.dumps({"train": value}))
    with pytest.raises(DataError, match=r"asks for '.*numpy\.savez"):
        read_arrays(path)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"ids": {"a", "b"}}, "it holds a set"),
        (np.zeros(2, [("a", "f4"), ("b", "O")]), "array of type 'V12'"),
        (np.array(["2024-01-01"], "M8[D]"), "array of type 'M8'"),
    ],
)
def test_other_contents(tmp_path: Path, value: object, reason: str) -> None:
    path = tmp_path / "other.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match=f"{reason}.*numpy.savez"):
        read_arrays(path)


def rebuilt(state: bytes) -> bytes:
    """A pickled array whose state is `state`, ops that make a tuple."""
    head = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return head + state + b"b."


FLOAT = b"cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R"
OBJECT = b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R"


@pytest.mark.parametrize(
    "data",
    [
        rebuilt(b"(K\x01K\x7f\x85" + FLOAT + b"\x89U\x08" + b"\0" * 8 + b"t"),
        rebuilt(b"(K\x01K\x01\x85" + OBJECT + b"\x89K\x05t"),
        rebuilt(b"(K\x01K\x01\x85K\x05\x89U\x08" + b"\0" * 8 + b"t"),
        rebuilt(b"N"),
        b"\x80\x02cnumpy\nndarray\nK\x05\x85R.",
        b"\x80\x02cnumpy\ndtype\n.",
        b"\x80\x02cnumpy\ndtype\nN}U\x04codeU\x01xs\x86b.",
        b"\x80\x02c_codecs\nencode\nX\x01\0\0\0xX\x05\0\0\0rot13\x86R.",
        b"\x80\x02c_codecs\nencode\n}U\x0b__globals__Nsb.",
        b"\x80\x02]q\0h\0a.",
        b"\x80\x02U\x03abcQ.",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
        b"",
        b"not a pickle",
        pickle.dumps(ARRAYS)[:-100],
    ],
    ids=[
        *("shape too large", "objects that are a number", "dtype that is a number", "no state"),
        *("array that is none", "type as a value", "state of a type", "other encoding"),
        *("state of a function", "holds itself", "persistent id", "huge length"),
        *("empty", "text", "truncated"),
    ],
)
def test_broken(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "broken.pkl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"broken\.pkl cannot be read as a pickle of arrays \(."):
        read_arrays(path)


def test_shared_lists_do_not_multiply(tmp_path: Path) -> None:
    """30 levels of a list twice in a list: 2^30 lists if each was copied on its own."""
    value: list = []
    for _ in range(30):
        value = [value, value]
    path = tmp_path / "nested.pkl"
    path.write_bytes(pickle.dumps(value))
    assert isinstance(read_arrays(path), list)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02]r" + struct.pack("<I", 1 << 26) + b".",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 30),
    ],
    ids=["memo", "bytearray"],
)
def test_short_pickles_take_no_gigabyte(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bomb.pkl"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    with contextlib.suppress(DataError):
        read_arrays(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"version https://git-lfs", "it is no pickle"), (pickle.dumps(ARRAYS, 2)[:-1], "breaks off")],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "other.pkl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=words):
        read_arrays(path)


def test_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "deep.pkl"
    path.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    with pytest.raises(DataError, match="cannot be read as a pickle of arrays"):
        read_arrays(path)


def test_too_large(tmp_path: Path) -> None:
    path = tmp_path / "large.pkl"
    with path.open("wb") as file:
        file.truncate(pickles.MAX_BYTES + 1)  # sparse: takes no room
    with pytest.raises(DataError, match=rf"has {pickles.MAX_BYTES + 1} bytes.*numpy\.savez"):
        read_arrays(path)
