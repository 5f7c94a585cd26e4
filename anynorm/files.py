"""State in files: `Value`, which saves, loads and moves itself, and the format beneath it.

A file holds the arrays of one state or of several, and a text in JSON with all that is no array: the version of the
format, each state's name, kind, options, and the dtypes of its arrays. A checksum covers every byte of it.
"""

import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import stat
import struct
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, NamedTuple, Never, Self, TypeVar

import numpy as np

from anynorm.arrays import FILED, Bits, compute_dtype, from_bits, library_of, moved, to_bits
from anynorm.keywords import checks_names, refuse

ArrayT = TypeVar("ArrayT")
StrPath = str | os.PathLike[str]

VERSION = 1
"""Of the format. A change that an older anynorm would misread makes it one more."""
MOST_STATES = 4096
MOST_ARRAYS = 4 * MOST_STATES + 1
MOST_LETTERS = 2**13
"""Of the name of a state."""
MOST_BYTES = 2**22
"""Of all that is no number of an array: names, options, and what says where arrays are."""


class Value(Generic[ArrayT]):
    """What a frozen dataclass of arrays, numbers and axes needs to be saved, loaded and moved."""

    @checks_names
    def save(self, path: StrPath, **others: Never) -> None:
        """Save this state, and its conventions with it.

        Parameters
        ----------
        path : str or path
            Where to: a name that ends in ``.npz`` or, with the package safetensors, in ``.safetensors``. What is
            there is replaced in one step, once the new file is whole and on the disk.

        Returns
        -------
        None

        Raises
        ------
        TypeError
            If the dtype of an array is not one for files.
        ValueError
            If `path` ends otherwise or is no regular file.
        ImportError
            If a package is missing.
        OSError
            If the file cannot be written.

        Examples
        --------
        >>> import tempfile, numpy as np, anynorm
        >>> running = anynorm.RunningStats.init(3, like=np.zeros(1), momentum=0.99)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     running.save(f"{folder}/bn1.npz")
        ...     anynorm.RunningStats.load(f"{folder}/bn1.npz")
        RunningStats(numpy float64 (3,), count=0, momentum=0.99, correction=0)
        """
        if others:
            refuse(others, self.save)
        write(path, {"": self}, single=True)

    @classmethod
    @checks_names
    def load(cls, path: StrPath, like: Any = None, **others: Never) -> Self:
        """The state that `save` put into a file.

        Parameters
        ----------
        path : str or path
            Of a file that `save` wrote.
        like : array, optional
            Gives the library and the device; without it arrays are NumPy's. Dtypes are those of the file, bit for bit.

        Returns
        -------
        The same kind of state

        Raises
        ------
        TypeError
            If `like` is not an array.
        ValueError
            If the file is cut short, changed, of another kind, or written by a newer version: the message names it.
        OSError
            If it cannot be read, as by `open`.
        ImportError
            If a package is missing.
        """
        if others:
            refuse(others, cls.load)
        state: Self
        (state,) = read(path, {cls.__name__: cls}, like, single=True).values()
        return state

    def to(self, like: Any) -> Self:
        """The same state in the library and dtype, and on the device, of another array.

        Parameters
        ----------
        like : array
            Real and floating. Its dtype is taken as it is: for statistics of 2-byte floats name a float32 array.

        Returns
        -------
        The same kind of state
            With the same conventions and counts. Within one library a gradient, a trace or a Dask graph goes along;
            from one to another arrays are computed, and copied.

        Raises
        ------
        TypeError
            If `like` is not a real floating array.
        """
        there = library_of("like", like)
        state, wide = self, compute_dtype(there, "like", like)
        here = library_of("state", next(iter(self._arrays().values())))
        with here.quiet(), there.quiet():
            if there.xp.finfo(wide).bits <= 32 and self._is_wide():
                state = state._replaced(state._cast(here.xp.float32))  # there may be no room for the wider there
            state = state._replaced(state._moved(like))
            return state._replaced(state._cast(like.dtype))

    def _arrays(self) -> dict[str, Any]:
        return self._parts(array=True)

    def _options(self) -> dict[str, Any]:
        return self._parts(array=False)

    def _parts(self, *, array: bool) -> dict[str, Any]:
        # by type and not by class, as a scalar of NumPy stands for an array where its field is one
        values = {each.name: (each.kw_only, getattr(self, each.name)) for each in fields(self)}  # type: ignore[arg-type]
        hidden = {each.name for each in fields(self) if not each.init}  # type: ignore[arg-type]
        return {
            name: value
            for name, (convention, value) in values.items()
            if (convention or type(value) in (int, float, type(None))) is not array
            and not (name in hidden and value is None)
        }

    def _cast(self, dtype: Any) -> dict[str, Any]:
        """The arrays, but for counts, in another dtype."""
        return {name: library_of(name, x).astype(x, dtype) for name, x in self._arrays().items()}

    def _moved(self, like: Any) -> dict[str, Any]:
        """The arrays in the library and on the device of another, each in its own dtype."""
        return {name: moved(name, x, like) for name, x in self._arrays().items()}

    @classmethod
    def _loaded(cls, bits: dict[str, Bits], like: Any) -> dict[str, Any]:
        """The arrays beside another, from what lies in a file."""
        return {name: from_bits(each, like) for name, each in bits.items()}

    def _is_wide(self) -> bool:
        """Whether an array has more digits than float32."""
        found = [(library_of(name, x), name, x) for name, x in self._arrays().items() if "count" not in name]
        return any(library.xp.finfo(compute_dtype(library, name, x)).bits > 32 for library, name, x in found)

    def _replaced(self, arrays: dict[str, Any]) -> Self:
        return self._made(self._options() | self._arrays() | arrays)

    @classmethod
    def _made(cls, parts: dict[str, Any]) -> Self:
        """The state of these fields, those included that are no arguments."""
        hidden = [each.name for each in fields(cls) if not each.init]  # type: ignore[arg-type]
        state = cls(**{name: part for name, part in parts.items() if name not in hidden})
        for name in hidden:
            if (part := parts.get(name)) is not None:
                object.__setattr__(state, name, part)
        return state


def write(path: StrPath, states: Mapping[str, Value[Any]], *, single: bool) -> None:
    """Write states to a file, which is there whole or not at all."""
    made = _format(path)
    arrays: dict[str, Any] = {}
    described = []
    for name, state in states.items():
        bits = {each: to_bits(each, x) for each, x in state._arrays().items()}
        arrays |= {_key(name, each): x.values for each, x in bits.items()}
        dtypes = {each: x.dtype for each, x in bits.items()}
        described.append({"name": name, "kind": type(state).__name__, "options": state._options(), "arrays": dtypes})
    text = json.dumps({"version": VERSION, "single": single, "states": described}, default=lambda number: number.item())
    whole = made.encode(arrays, text)
    outline = made.outline(whole[:LOOKED_AT], whole[-LOOKED_AT:], len(whole))
    if outline is None or max(outline.nbytes, len(text)) > MOST_BYTES:
        raise ValueError(f"states must have names that take at most {MOST_BYTES} bytes in a file, got more")
    _replace(Path(path), _sealed(whole, outline.at))


def read(path: StrPath, kinds: Mapping[str, type[Value[Any]]], like: Any, *, single: bool) -> dict[str, Any]:
    """The states of a file, everything checked before the first is made."""
    made = _format(path)
    if like is not None:
        library_of("like", like)
    _check_regular(path, Path(path))  # a pipe, or a device, may never end
    with Path(path).open("rb") as file:
        _check_whole(path, made, file)
        file.seek(0)
        whole = file.read()
    try:
        text, arrays = made.decode(whole)
        content = json.loads(text, object_pairs_hook=_unique)
        version = content["version"]
    except Exception as error:  # whatever a file that was made on purpose does to the parsers
        raise ValueError(f"{path} must hold what anynorm saves, got: {_brief(repr(error))}") from error
    if not isinstance(version, int) or version > VERSION:
        found = _brief(repr(version))
        raise ValueError(f"{path} must be of format {VERSION} or older, got {found}: a newer anynorm wrote it")
    _check_kinds(path, content, kinds, single)
    try:
        return _decoded(content["states"], arrays, kinds, like, single)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold what anynorm saves, got what does not fit: {_brief(str(error))}") from error


def check_name(name: object) -> None:
    """An error unless a state may have this name in a file."""
    if not isinstance(name, str):
        raise TypeError(f"states must have names that are strings, got {name!r:.60}")
    if not name or not name.isprintable():
        raise ValueError(f"states must have names that can be printed, got {name!r:.60}")
    if len(name) > MOST_LETTERS:
        raise ValueError(f"states must have names of at most {MOST_LETTERS} letters, got {len(name)}: {name!r:.20}...")


def check_number(number: int) -> None:
    """An error if a file holds no more states than these."""
    if number > MOST_STATES:
        raise ValueError(f"states must be at most {MOST_STATES}, got {number}")


class _Outline(NamedTuple):
    """What the beginning and the end of a file say of it."""

    at: int
    """Where the checksum is."""
    arrays: int
    nbytes: int
    """The bytes of names, and of what says where arrays are."""


class _Format(NamedTuple):
    """A kind of file."""

    encode: Callable[[dict[str, Any], str], bytes]
    """The file of these arrays and this text, zeros in place of the checksum."""
    decode: Callable[[bytes], tuple[str, dict[str, Any]]]
    seal: Callable[[bytes], int]
    """Where the checksum is; less than 0 if there is none."""
    outline: Callable[[bytes, bytes, int], _Outline | None]
    """From its first and its last `LOOKED_AT` bytes, and their number in all; None if it is of another kind."""


LOOKED_AT = MOST_BYTES + 128


def _check_whole(path: StrPath, made: _Format, file: BinaryIO) -> None:
    """An error unless a file is as it was written, which its beginning and its end may tell; it takes little memory."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(LOOKED_AT)
    file.seek(max(0, size - LOOKED_AT))
    outline, excess = made.outline(head, file.read(LOOKED_AT), size), ""
    if outline is not None and outline.arrays > MOST_ARRAYS:
        excess = f"more than {MOST_ARRAYS} arrays"
    elif outline is not None and outline.nbytes > MOST_BYTES:
        excess = f"more than {MOST_BYTES} bytes of names"
    if excess:
        raise ValueError(f"{path} must be a whole file of anynorm, got one that has {excess}")
    if outline is None or not _is_sealed(file, outline.at):
        raise ValueError(f"{path} must be a whole file of anynorm, got one that is cut short, changed or another's")


def _format(path: StrPath) -> _Format:
    named = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(named, str):
        raise TypeError(f"path must be a str or a path, got {type(path if named is None else named).__name__}")
    suffix = Path(named).suffix
    if suffix not in _FORMATS:
        raise ValueError(f"path must end in {' or '.join(_FORMATS)}, got {_brief(named)}")
    try:
        nameable = b"\0" not in os.fsencode(named)
    except UnicodeEncodeError:
        nameable = False
    if not nameable:
        raise ValueError(f"path must be a name that a file may have, got {_brief(repr(named))}")
    if suffix == ".safetensors":
        try:
            import safetensors  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{path} needs the package safetensors: pip install 'anynorm[safetensors]'") from error
    return _FORMATS[suffix]


def _key(state: str, array: str) -> str:
    """What an array is called in a file."""
    array = array.removeprefix("_")
    return f"{state}.{array}" if state else array


def _check_kinds(path: StrPath, content: Any, kinds: Mapping[str, type[Value[Any]]], single: bool) -> None:
    try:
        found = [_brief(str(each["kind"])) for each in content["states"]]
        alone = bool(content["single"])
        if alone and len(found) != 1:
            raise ValueError(f"{len(found)} states for one")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold what anynorm saves, got: {_brief(repr(error))}") from error
    names = " or ".join(kinds)
    if single and not alone:
        raise ValueError(f"{path} must hold one {names}, got {len(found)} states by name: anynorm.load reads them")
    if alone and not single:
        raise ValueError(f"{path} must hold states by name, got one {found[0]}: {found[0]}.load reads it")
    for kind in found:
        if kind not in kinds:
            raise ValueError(f"{path} must hold {names}, got {kind}")


def _decoded(
    states: list[Any], arrays: dict[str, Any], kinds: Mapping[str, type[Value[Any]]], like: Any, single: bool
) -> dict[str, Value[Any]]:
    check_number(len(states))
    for each in states:
        if single and each["name"] != "":
            raise ValueError("the one state must have no name")
        if not single:
            check_name(each["name"])
    keys = [_key(each["name"], array) for each in states for array in each["arrays"]]
    if sorted(keys) != sorted(arrays):
        raise ValueError(f"the arrays must be {sorted(keys)}, are {sorted(arrays)}")
    made = {}
    for each in states:
        kind, name = kinds[each["kind"]], each["name"]
        expected = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        hidden = {field.name for field in fields(kind) if not field.init}  # type: ignore[arg-type]
        if {*each["arrays"], *each["options"]} | hidden != expected:
            raise ValueError(f"{name} must have {sorted(expected)}, has {sorted({*each['arrays'], *each['options']})}")
        parts = {option: tuple(x) if isinstance(x, list) else x for option, x in each["options"].items()}
        bits = {}
        for array, dtype in each["arrays"].items():
            values = arrays[_key(name, array)]
            if dtype not in FILED or values.dtype != ("uint16" if dtype == "bfloat16" else dtype):
                raise ValueError(f"{_key(name, array)} must be of {dtype}, is of {values.dtype}")
            bits[array] = Bits(dtype, values)
        made[name] = kind._made(parts | kind._loaded(bits, like))
    return made


def _check_regular(path: StrPath, target: Path) -> None:
    """An error if what is there is no file."""
    mode = target.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} must be a regular file, got a pipe, a socket or a device")


def _replace(path: Path, whole: bytes) -> None:
    """Put a file in the place of another, or of none, in one step that, once done, no power cut undoes."""
    target = Path(os.path.realpath(path))  # a link stays one, and what it leads to is replaced
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder of a file to be saved must exist", str(path))
    with suppress(FileNotFoundError):
        _check_regular(path, target)
    temporary = target.parent / f".anynorm-{secrets.token_hex(8)}.tmp"
    try:
        # opened as a new file of the user's is, so that it has the permissions of one
        with temporary.open("xb") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("two entries of one name")
    return found


def _brief(text: str) -> str:
    """So much of a text as a message has room for, which may come from anywhere."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


_ZEROS = b"0" * 64


def _sealed(whole: bytes, at: int) -> bytes:
    """The file with its checksum."""
    return whole[:at] + _checksum(io.BytesIO(whole), at) + whole[at + len(_ZEROS) :]


def _is_sealed(file: BinaryIO, at: int) -> bool:
    file.seek(at)
    return file.read(len(_ZEROS)) == _checksum(file, at)


def _checksum(file: BinaryIO, at: int) -> bytes:
    """Of a file, piece by piece, with zeros in the checksum's own place."""
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(min(2**20, at - file.tell())):
        digest.update(piece)
    digest.update(_ZEROS)
    file.seek(at + len(_ZEROS))
    while piece := file.read(2**20):
        digest.update(piece)
    return digest.hexdigest().encode()


_TEXT = "anynorm"
"""The name of the text in a file."""


def _npz(arrays: dict[str, Any], text: str) -> bytes:
    buffer = io.BytesIO()
    arrays = arrays | {_TEXT: np.frombuffer(text.encode(), np.uint8)}
    np.savez(buffer, **arrays)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = _ZEROS
    return buffer.getvalue()


def _from_npz(whole: bytes) -> tuple[str, dict[str, Any]]:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = archive.infolist()
    names = [each.filename.removesuffix(".npy") for each in members]
    if len(set(names)) < len(names):
        raise ValueError("two arrays of one name")
    packed = any(each.compress_type != zipfile.ZIP_STORED or each.flag_bits & 1 for each in members)
    if packed or sum(each.file_size for each in members) > len(whole):
        raise ValueError("an array that is packed or larger than the file")
    arrays = {}
    for name, each in zip(names, members, strict=True):
        start = each.header_offset + 30
        start += sum(struct.unpack("<2H", whole[start - 4 : start]))  # of its name, and of what else there is
        arrays[name] = _from_npy(memoryview(whole)[start : start + each.file_size])
    text = arrays.pop(_TEXT).tobytes()
    if len(text) > MOST_BYTES:
        raise ValueError(f"{len(text)} bytes of names and options")
    return text.decode(), arrays


def _from_npy(whole: memoryview) -> Any:
    """What `numpy.load` gives, if there are as many bytes as the header says; it would make room for them first."""
    if bytes(whole[:8]) != b"\x93NUMPY\x01\x00":
        raise ValueError("an array of another format")
    start = 10 + int.from_bytes(whole[8:10], "little")
    shape, order, dtype = _npy_header(bytes(whole[8:start]))
    values = whole[start:]
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(values):
        raise ValueError(f"an array of {shape} {dtype} in {len(values)} bytes")
    return np.ndarray(shape, dtype, values, order=order)


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], Literal["C", "F"], Any]:
    shape, columns_first, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    return shape, "F" if columns_first else "C", dtype


def _npz_outline(head: bytes, tail: bytes, size: int) -> _Outline | None:
    """From the record that ends the archive, and has the checksum for its comment."""
    end = tail[-22 - len(_ZEROS) : -len(_ZEROS)]
    if head[:4] != b"PK\3\4" or len(end) != 22:
        return None
    signature, _, _, _, arrays, nbytes, _, comment = struct.unpack("<4s4H2LH", end)
    if signature != b"PK\5\6" or comment != len(_ZEROS):
        return None
    outline = _Outline(size - len(_ZEROS), arrays, nbytes)
    if arrays > MOST_ARRAYS or nbytes > MOST_BYTES:
        return outline
    try:
        members = zipfile.ZipFile(io.BytesIO(tail)).infolist()  # the directory is there, if not what it leads to
    except Exception:  # as in `read`
        return None
    beside = size - nbytes - sum(each.compress_size for each in members)
    return outline if 0 <= beside <= 128 + sum(64 + 4 * len(each.filename) for each in members) else None


def _safetensors(arrays: dict[str, Any], text: str) -> bytes:
    from safetensors.numpy import save

    whole: bytes = save(arrays, {_TEXT: text, "sha256": _ZEROS.decode()})
    return whole


def _from_safetensors(whole: bytes) -> tuple[str, dict[str, Any]]:
    from safetensors.numpy import load

    header = json.loads(_header(whole), object_pairs_hook=_unique)
    if len(header) > MOST_ARRAYS:
        raise ValueError(f"{len(header)} arrays")
    return str(header["__metadata__"][_TEXT]), load(whole)


def _safetensors_seal(whole: bytes) -> int:
    # within the text of a state's name a quote has a backslash before it
    found = re.search(rb'"sha256":"[0-9a-f]{64}"', _header(whole))
    return -1 if found is None else found.end() + 8 - 65


def _safetensors_outline(head: bytes, _: bytes, size: int) -> _Outline | None:
    at, nbytes = _safetensors_seal(head), int.from_bytes(head[:8], "little")
    ends = map(int, re.findall(rb'"data_offsets":\[\d+,(\d{1,20})\]', _header(head)))
    if nbytes <= MOST_BYTES and max(ends, default=0) != size - 8 - nbytes:
        return None
    return None if at < 0 or nbytes > size - 8 else _Outline(at, 0, nbytes)


def _header(whole: bytes) -> bytes:
    return whole[8 : 8 + int.from_bytes(whole[:8], "little")]


_FORMATS = {
    ".npz": _Format(_npz, _from_npz, lambda whole: len(whole) - len(_ZEROS), _npz_outline),
    ".safetensors": _Format(_safetensors, _from_safetensors, _safetensors_seal, _safetensors_outline),
}
