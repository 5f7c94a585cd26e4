"""How calls are run, where the user has a say in it: the engine, threads, the size of a block."""

import os
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any, NamedTuple

from anynorm.arrays.checks import check_int
from anynorm.keywords import checks_names

ENGINES = ("auto", "numba", "arrays")
MOST_THREADS = 4
"""As many as the interpreter's lock leaves something to do, where nobody asked for more."""


class Options(NamedTuple):
    """What is in force."""

    engine: str
    threads: int
    block_bytes: int


TRACED = Options("arrays", 1, 2**22)
"""What is in force where a compiler traces, which cannot look into the settings."""


class Within(ContextDecorator):
    """What `options` gives: it may be entered again, also while it is entered, and in any thread or task."""

    def __init__(self, **named: Any) -> None:
        self._named = named

    def __enter__(self) -> None:
        _entered.set((*_entered.get(), (self, current()._replace(**self._named))))

    def __exit__(self, *_: object) -> None:
        entered = list(_entered.get())
        for place in reversed(range(len(entered))):  # the last is another's where generators take turns
            if entered[place][0] is self:
                del entered[place]
                break
        _entered.set(tuple(entered))


@checks_names
def options(
    *,
    engine: str | None = None,
    threads: int | None = None,
    block_bytes: int | None = None,
) -> Within:
    """Say how the calls inside a ``with`` are run; results are the same to rounding.

    Parameters
    ----------
    engine : {"auto", "numba", "arrays"}, optional
        What computes. "numba": loops that numba compiles, where arrays are NumPy's, PyTorch's on a processor, or such
        in the chunks of Dask; what they cannot read where it lies, as numbers in another byte order or of more than 8
        bytes, is computed by array operations all the same. "arrays": array operations alone, also on a GPU. "auto",
        the default, and that of the environment's ``ANYNORM_ENGINE``: loops for calls of 1 MiB and more, if numba is
        installed, and CuPy's programs on a GPU.
    threads : int, optional
        How many threads share a large array. By default that of the environment's ``ANYNORM_NUM_THREADS``, else
        one for each processor, and no more than 4.
    block_bytes : int, optional
        The size of the blocks, in bytes, in which large arrays are run; by default 4 MiB. A block and what is computed
        of it should fit into the cache of a processor.

    Returns
    -------
    context manager
        Also a decorator of functions. What is not named stays as it is outside, and a gradient is run as its call was.
        It may be entered again, nested in itself too; concurrent uses, in threads and in asynchronous tasks, do not see
        each other.

    Raises
    ------
    TypeError
        If `threads` or `block_bytes` is not an int.
    ValueError
        If one of them is less than 1, or `engine` is not one of those; from a call inside, if "numba" is given an array
        of another library.
    ImportError
        From a call inside, if "numba" is asked for and cannot be imported.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> with anynorm.options(threads=1):
    ...     anynorm.layer_norm(np.array([[1.0, 3.0]]), eps=0)
    array([[-1.,  1.]])
    """
    named: dict[str, Any] = {}
    if engine is not None:
        named["engine"] = _engine("engine", engine)
    if threads is not None:
        named["threads"] = _at_least_one("threads", threads)
    if block_bytes is not None:
        named["block_bytes"] = _at_least_one("block_bytes", block_bytes)
    return Within(**named)


def current() -> Options:
    """The options in force here."""
    entered = _entered.get()
    return entered[-1][1] if entered else _default()


def default_threads() -> int:
    """How many threads there are where nobody says otherwise."""
    return _default().threads


_entered: ContextVar[tuple[tuple[Within, Options], ...]] = ContextVar("anynorm.options", default=())
_defaults: list[Options] = []


def _default() -> Options:
    if not _defaults:
        _defaults.append(
            Options(_engine("ANYNORM_ENGINE", os.environ.get("ANYNORM_ENGINE") or "auto"), _threads(), 2**22)
        )
    return _defaults[0]


def _threads() -> int:
    asked = os.environ.get("ANYNORM_NUM_THREADS")
    if not asked:
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(processors, MOST_THREADS)
    if not asked.isdecimal() or int(asked) < 1:
        raise ValueError(f"ANYNORM_NUM_THREADS must be a whole number of at least 1, got {asked!r}")
    return int(asked)


def _at_least_one(name: str, value: object) -> int:
    number = check_int(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def _engine(name: str, value: object) -> str:
    if not isinstance(value, str) or value not in ENGINES:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, ENGINES))}, got {value!r:.40}")
    return value
