"""`Value`: what a frozen dataclass of arrays, numbers and axes needs to be saved, loaded and moved."""

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from anynorm import files
from anynorm.arrays.checks import compute_dtype
from anynorm.arrays.convert import Bits, from_bits, moved, to_bits
from anynorm.arrays.recognize import library_of
from anynorm.files import Record
from anynorm.keywords import checks_names

StrPath = str | os.PathLike[str]

if TYPE_CHECKING:  # what `load` gives has arrays of Any, and needs no annotation
    from typing_extensions import TypeVar as TypeVarWithDefault

    ArrayT = TypeVarWithDefault("ArrayT", default=Any)
else:
    ArrayT = TypeVar("ArrayT")


class Value(Generic[ArrayT]):
    """What a frozen dataclass of arrays, numbers and axes needs to be saved, loaded and moved."""

    _later: ClassVar[frozenset[str]] = frozenset()
    """The arguments that came later: a file without one has its default."""

    @checks_names
    def save(self, path: StrPath) -> None:
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
        RunningStats(numpy float64 (3,), mean=[0. 0. 0.], std=[1. 1. 1.], count=0, momentum=0.99, correction=0)
        """
        write(path, {"": self})

    @classmethod
    @checks_names
    def load(cls, path: StrPath, like: Any = None) -> Self:
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
        here = library_of("state", next(iter(self._arrays().values())))
        narrow = there.xp.finfo(compute_dtype(there, "like", like)).bits <= 32
        with here.quiet(), there.quiet():
            # before they move, as there may be no float64 there
            state = self._replaced(self._cast(here.xp.float32)) if narrow else self
            state = state._replaced(state._moved(like))
            return state._replaced(state._cast(like.dtype))

    def _arrays(self) -> dict[str, Any]:
        """The fields that are arrays: all but conventions, counts that are numbers, and what is None."""
        # by type and not by class, as a scalar of NumPy stands for an array
        values = {field.name: getattr(self, field.name) for field in fields(self) if not field.kw_only}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if type(value) not in (int, float, type(None))}

    def _options(self) -> dict[str, Any]:
        """The arguments that are no arrays."""
        arrays = self._arrays()
        names = [field.name for field in fields(self) if field.init]  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in names if name not in arrays}

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

    def _replaced(self, arrays: dict[str, Any]) -> Self:
        return self._made(self._options() | self._arrays() | arrays)

    @classmethod
    def _made(cls, parts: dict[str, Any]) -> Self:
        """The state of these fields, those included that are no arguments."""
        hidden = {field.name for field in fields(cls) if not field.init}  # type: ignore[arg-type]
        state = cls(**{name: part for name, part in parts.items() if name not in hidden})
        for name in hidden & parts.keys():
            if parts[name] is not None:
                object.__setattr__(state, name, parts[name])
        return state

    @classmethod
    def _of(cls, record: Record, like: Any) -> Self:
        """The state of a record, which may come from anywhere."""
        known = {field.name: field.init for field in fields(cls)}  # type: ignore[arg-type]
        names, required = {*record.arrays, *record.options}, {name for name, init in known.items() if init}
        if not required - cls._later <= names <= known.keys():
            raise ValueError(f"{cls.__name__} must have {sorted(required)}, has {sorted(names)}")
        options = {name: tuple(x) if isinstance(x, list) else x for name, x in record.options.items()}
        return cls._made(options | cls._loaded(record.arrays, like))


ARRAY = "array"
"""The kind of a record that holds an array and nothing else, and the name of that array in it."""


def write(path: StrPath, states: Mapping[str, Any]) -> None:
    """Write states and arrays by name, or one state without a name, to a file."""
    records = (_record(name, state) for name, state in states.items())
    files.write(path, records)  # which looks at the path before Dask computes


def _record(name: str, state: Any) -> Record:
    if not isinstance(state, Value):
        return Record(name, ARRAY, {}, {ARRAY: to_bits(name, state)})
    bits = {key: to_bits(key, x) for key, x in state._arrays().items()}
    return Record(name, type(state).__name__, state._options(), bits)


def read(path: StrPath, kinds: Mapping[str, type[Value[Any]]], like: Any, *, single: bool) -> dict[str, Any]:
    """The states and arrays of a file by name; or, if it is to be a `single` state, that."""
    if like is not None:
        library_of("like", like)
    records = files.read(path)
    alone, wanted = [record.name for record in records] == [""], " or ".join(kinds)
    if single and not alone:
        raise ValueError(f"{path} must hold one {wanted}, got {len(records)} states by name: anynorm.load reads them")
    if alone and not single:
        kind = records[0].kind
        raise ValueError(f"{path} must hold states by name, got one {kind}: {kind}.load reads it")
    for record in records:
        if record.kind not in kinds and (single or record.kind != ARRAY):
            raise ValueError(f"{path} must hold {wanted}, got {record.kind}")
    with files.refusing(path, AttributeError, TypeError, ValueError):
        return {record.name: _state(record, kinds, like) for record in records}


def _state(record: Record, kinds: Mapping[str, type[Value[Any]]], like: Any) -> Any:
    if record.kind != ARRAY:
        return kinds[record.kind]._of(record, like)
    if record.arrays.keys() != {ARRAY} or record.options:
        raise ValueError(f"an array must have {[ARRAY]}, has {sorted([*record.arrays, *record.options])}")
    return from_bits(record.arrays[ARRAY], like)
