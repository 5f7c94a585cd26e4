"""The format of saved state: records of arrays and options, in .npz or .safetensors.

Beside the arrays a file holds a text in JSON with all that is no array: the version of the format, each state's name,
kind and options, and the dtypes of its arrays. A checksum covers every byte of it.
"""

import errno
import hashlib
import io
import json
import os
import re
import secrets
import stat
import struct
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from anynorm.arrays.convert import FILED, Bits

StrPath = str | os.PathLike[str]

VERSION = 1
"""Of the format. A change that an older anynorm would misread makes it one more."""
MOST_STATES = 4096
MOST_ARRAYS = 7 * MOST_STATES + 1
MOST_LETTERS = 2**13
"""Of the name of a state."""
MOST_BYTES = 2**22
"""Of all that is no number of an array: names, options, and what says where arrays are."""


class Record(NamedTuple):
    """A state, or an array, as it lies in a file."""

    name: str
    """Empty, if it is alone in the file."""
    kind: str
    options: dict[str, Any]
    """What JSON can hold."""
    arrays: dict[str, Bits]


def write(path: StrPath, records: Iterable[Record]) -> None:
    """Write records to a file, which is there whole or not at all."""
    form = _format(path)
    arrays: dict[str, Any] = {}
    states = []
    for name, kind, options, bits in records:
        arrays |= {_key(name, array): x.values for array, x in bits.items()}
        dtypes = {array: x.dtype for array, x in bits.items()}
        states.append({"name": name, "kind": kind, "options": options, "arrays": dtypes})
    single = [state["name"] for state in states] == [""]
    text = json.dumps({"version": VERSION, "single": single, "states": states})
    content = form.encode(arrays, text)
    at = form.checksum_at(io.BytesIO(content))
    if at is None or len(text) > MOST_BYTES:  # `read` would refuse it
        raise ValueError(f"states must have names that take at most {MOST_BYTES} bytes in a file, got more")
    _replace(Path(path), content[:at] + _checksum(content, at) + content[at + len(_ZEROS) :])


def read(path: StrPath) -> list[Record]:
    """The records of a file, which must be as `write` left it."""
    form = _format(path)
    _check_regular(path, Path(path))  # a pipe, or a device, may never end
    with Path(path).open("rb") as file:
        at = form.checksum_at(file)  # first, as another file may be very large
        file.seek(0)
        content = b"" if at is None else file.read()
    if at is None or content[at : at + len(_ZEROS)] != _checksum(content, at):
        raise ValueError(f"{path} must be a whole file of anynorm, got one that is cut short, changed or another's")
    with refusing(path, Exception):  # whatever a file that was made on purpose does to the parsers
        text, arrays = form.decode(content)
        if len(text) > MOST_BYTES:
            raise ValueError(f"{len(text)} letters of names and options")
        described = json.loads(text, object_pairs_hook=_unique)
        version = described["version"]
    if not isinstance(version, int) or version > VERSION:
        shown = _brief(repr(version))
        raise ValueError(f"{path} must be of format {VERSION} or older, got {shown}: a newer anynorm wrote it")
    with refusing(path, Exception):
        states, single = described["states"], described["single"]
        if single != ([state["name"] for state in states] == [""]):
            raise ValueError("one state without a name must be alone")
        if not single:
            check_names([state["name"] for state in states])
        records = [_record(state, arrays) for state in states]
        if arrays:
            raise ValueError(f"arrays of no state: {sorted(arrays)}")
    return records


def check_names(names: Collection[object]) -> None:
    """An error unless states may have these names in a file."""
    if len(names) > MOST_STATES:
        raise ValueError(f"states must be at most {MOST_STATES}, got {len(names)}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"states must have names that are strings, got {name!r:.60}")
        if not name or not name.isprintable():
            raise ValueError(f"states must have names that can be printed, got {name!r:.60}")
        if len(name) > MOST_LETTERS:
            shown = f"{len(name)}: {name!r:.20}..."
            raise ValueError(f"states must have names of at most {MOST_LETTERS} letters, got {shown}")


@contextmanager
def refusing(path: StrPath, *errors: type[Exception]) -> Iterator[None]:
    """These errors as one that names the file."""
    try:
        yield
    except errors as error:
        raise ValueError(f"{path} must hold what anynorm saves, got: {_brief(repr(error))}") from error


def _record(state: dict[str, Any], arrays: dict[str, Any]) -> Record:
    """What a file says of a state, with its arrays, which are taken out of `arrays`."""
    bits = {}
    for array, dtype in state["arrays"].items():
        values = arrays.pop(_key(state["name"], array))
        if dtype not in FILED or values.dtype != ("uint16" if dtype == "bfloat16" else dtype):
            raise ValueError(f"{array} must be of {dtype}, is of {values.dtype}")
        bits[array] = Bits(dtype, values)
    return Record(state["name"], _brief(str(state["kind"])), dict(state["options"]), bits)


def _key(state: str, array: str) -> str:
    """What an array is called in a file."""
    array = array.removeprefix("_")
    return f"{state}.{array}" if state else array


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("two entries of one name")
    return unique


def _brief(text: str) -> str:
    """So much of a text as goes into a message, which may come from anywhere."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check_regular(path: StrPath, target: Path) -> None:
    """An error if what is there is neither a file nor a folder; that it is a folder the system says itself."""
    mode = target.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path} must be a regular file, got a pipe, a socket or a device")


def _replace(path: Path, content: bytes) -> None:
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
            file.write(content)
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


_ZEROS = b"0" * 64
"""In the place of the checksum while it is taken."""


def _checksum(content: bytes, at: int) -> bytes:
    digest = hashlib.sha256(memoryview(content)[:at])
    digest.update(_ZEROS)
    digest.update(memoryview(content)[at + len(_ZEROS) :])
    return digest.hexdigest().encode()


class _Format(NamedTuple):
    """A kind of file."""

    encode: Callable[[dict[str, Any], str], bytes]
    """The file of these arrays and this text, zeros in place of the checksum."""
    decode: Callable[[bytes], tuple[str, dict[str, Any]]]
    checksum_at: Callable[[BinaryIO], int | None]
    """Where the checksum is, from the ends of a file; None if it is of another kind or size, or holds too much."""


def _format(path: StrPath) -> _Format:
    named = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(named, str):
        raise TypeError(f"path must be a str or a path, got {type(named).__name__}")
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
            raise ImportError(f"{path} needs the package safetensors: pip install safetensors") from error
    return _FORMATS[suffix]


_TEXT = "anynorm"
"""The name of the text in a file."""


def _npz(arrays: dict[str, Any], text: str) -> bytes:
    buffer = io.BytesIO()
    arrays = arrays | {_TEXT: np.frombuffer(text.encode(), np.uint8)}
    np.savez(buffer, **arrays)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = _ZEROS
    return buffer.getvalue()


def _from_npz(content: bytes) -> tuple[str, dict[str, Any]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name.removesuffix(".npy"), _from_npy(archive.read(name))) for name in archive.namelist()]
    arrays = _unique(members)
    return arrays.pop(_TEXT).tobytes().decode(), arrays


def _from_npy(content: bytes) -> Any:
    """What `numpy.load` gives; that would allocate as many numbers as a header claims."""
    start = 10 + int.from_bytes(content[8:10], "little")
    shape, columns_first, dtype = _npy_header(content[:start])
    return np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if columns_first else "C")


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, Any]:
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array of another format")
    return np.lib.format.read_array_header_1_0(file)


def _npz_checksum(file: BinaryIO) -> int | None:
    """The comment of the archive, whose directory lies at its end."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - MOST_BYTES - 2**10))
    tail = file.read()
    try:
        signature, number, nbytes, length = struct.unpack("<4s6xHL4xH", tail[-22 - len(_ZEROS) : -len(_ZEROS)])
        if (signature, length) != (b"PK\5\6", len(_ZEROS)) or number > MOST_ARRAYS or nbytes > MOST_BYTES:
            return None
        members = zipfile.ZipFile(io.BytesIO(tail)).infolist()  # the directory is there, if not what it leads to
    except Exception:  # as in `read`
        return None
    beside = size - sum(member.file_size for member in members)
    return size - len(_ZEROS) if 0 <= beside <= 3 * MOST_BYTES else None


def _safetensors(arrays: dict[str, Any], text: str) -> bytes:
    from safetensors.numpy import save

    content: bytes = save(arrays, {_TEXT: text, "sha256": _ZEROS.decode()})
    return content


def _from_safetensors(content: bytes) -> tuple[str, dict[str, Any]]:
    from safetensors.numpy import load

    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")], object_pairs_hook=_unique)
    return str(header["__metadata__"][_TEXT]), load(content)


def _safetensors_checksum(file: BinaryIO) -> int | None:
    """An entry of the header, which also says where the last array ends."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    header = file.read(length) if length <= MOST_BYTES else b""
    # within the text of a state's name a quote has a backslash before it
    found = re.search(rb'"sha256":"[0-9a-f]{64}"', header)
    ends = re.findall(rb'"data_offsets":\[\d+,(\d{1,20})\]', header)
    end = 8 + length + max(map(int, ends), default=0)
    return None if found is None or end != size or len(ends) > MOST_ARRAYS else 8 + found.end() - 1 - len(_ZEROS)


_FORMATS = {
    ".npz": _Format(_npz, _from_npz, _npz_checksum),
    ".safetensors": _Format(_safetensors, _from_safetensors, _safetensors_checksum),
}
