"""`save` and `load`: states and arrays by name, all in one file."""

import os
from collections.abc import Mapping
from typing import Any

from anynorm import values
from anynorm.arrays.recognize import is_array
from anynorm.batches import Moments
from anynorm.files import check_names
from anynorm.keywords import checks_names
from anynorm.state import RunningStats
from anynorm.values import Value
from anynorm.weight import WeightNorm


@checks_names
def save(states: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Save states and arrays by name, all in one file.

    Parameters
    ----------
    states : dict of str to RunningStats, WeightNorm, Moments or array
        Of any libraries: gamma and beta beside the running statistics, say. Dask computes its own; a gradient is left
        behind.
    path : str or path
        Where to: a name that ends in ``.npz`` or, with the package safetensors, in ``.safetensors``. What is there
        is replaced in one step, once the new file is whole and on the disk.

    Returns
    -------
    None

    Raises
    ------
    TypeError
        If `states` is not such a dict, or the dtype of an array is not one for files.
    ValueError
        If `path` ends otherwise or is no regular file, or a name is empty, not printable or longer than 8,192 letters,
        or there are more than 4,096 states, or all that is no array takes more than 4 MiB.
    ImportError
        If a package is missing.
    OSError
        If the file cannot be written.

    References
    ----------
    https://github.com/safetensors/safetensors#format; NEP 1, "A simple file format for NumPy arrays".

    Examples
    --------
    >>> import tempfile, numpy as np, anynorm
    >>> running = anynorm.RunningStats.init(3, like=np.zeros(1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     anynorm.save({"bn1": running, "bn2": running}, f"{folder}/norms.npz")
    ...     anynorm.load(f"{folder}/norms.npz")["bn2"]
    RunningStats(numpy float64 (3,), mean=[0. 0. 0.], std=[1. 1. 1.], count=0, momentum=0.9, correction=0)
    """
    if not isinstance(states, Mapping):
        raise TypeError(f"states must be a dict of states by name, got {type(states).__name__}")
    check_names(states)
    for name, state in states.items():
        if type(state) not in _KINDS.values() and not is_array(state):
            raise TypeError(f"states must hold {', '.join(_KINDS)} or arrays, got {type(state).__name__} as {name!r}")
    values.write(path, states)


@checks_names
def load(path: str | os.PathLike[str], like: Any = None) -> dict[str, Any]:
    """The states and arrays that `save` put into a file.

    Parameters
    ----------
    path : str or path
        Of a file that `save` wrote.
    like : array, optional
        Gives the library and the device; without it arrays are NumPy's. Dtypes are those of the file, bit for bit.

    Returns
    -------
    dict of str to RunningStats, WeightNorm, Moments or array
        In the order in which they were saved.

    Raises
    ------
    TypeError, ValueError, OSError, ImportError
        As in `RunningStats.load`.

    References
    ----------
    As in `save`.

    Examples
    --------
    See `save`.

    >>> import anynorm
    >>> anynorm.load("norms.pickle")
    Traceback (most recent call last):
    ValueError: path must end in .npz or .safetensors, got norms.pickle
    """
    return values.read(path, _KINDS, like, single=False)


_KINDS: dict[str, type[Value[Any]]] = {"Moments": Moments, "RunningStats": RunningStats, "WeightNorm": WeightNorm}
