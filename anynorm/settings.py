"""How calls are run, where the user has a say in it: threads, the size of a block, a compiler."""

import os
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any, NamedTuple, Never

from anynorm.arrays import check_int
from anynorm.keywords import checks_names, refuse

COMPILERS = ("none", "torch", "jax", "cupy")
MOST_THREADS = 4
"""As many as the interpreter's lock leaves something to do, where nobody asked for more."""


class Options(NamedTuple):
    """What is in force."""

    threads: int
    block_bytes: int
    compiler: str


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
    *, threads: int | None = None, block_bytes: int | None = None, compiler: str | None = None, **others: Never
) -> Within:
    """Say how the calls inside a ``with`` are run; results are the same to rounding.

    Parameters
    ----------
    threads : int, optional
        How many threads share a large NumPy array. By default that of the environment's ``ANYNORM_NUM_THREADS``, else
        one for each processor, and no more than 4.
    block_bytes : int, optional
        The size of the blocks, in bytes, in which large arrays are run; by default 4 MiB. A block and what is computed
        of it should fit into the cache of a processor.
    compiler : {"torch", "jax", "cupy", "none"}, optional
        Hand the kernels to that library's compiler, whatever library x is of ("cupy" takes arrays of CuPy alone, which
        are compiled anyway); arrays are passed without a copy. A first call of its kind waits for the compiler; another
        batch size does not, except with "jax". Calls that are traced already or have `weights`,
        `all_reduce` or `moments`, Dask arrays and empty ones are run as ever. "none", the default, does without.

    Returns
    -------
    context manager
        Also a decorator of functions. What is not named stays as it is outside. It may be entered again, nested in
        itself too; concurrent uses, in threads and in asynchronous tasks, do not see each other.

    Raises
    ------
    TypeError
        If `threads` or `block_bytes` is not an int.
    ValueError
        If one of them is less than 1, or `compiler` is not one of those; from a call inside, if "cupy" is given an
        array of another library.
    ImportError
        From a call inside, if the compiler's library is not installed.
    RuntimeError
        From a call inside, if "torch" finds no C++ compiler for a processor.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> with anynorm.options(threads=1):
    ...     anynorm.layer_norm(np.array([[1.0, 3.0]]), eps=0)
    array([[-1.,  1.]])
    """
    if others:
        refuse(others, options)
    named: dict[str, Any] = {}
    if threads is not None:
        named["threads"] = _at_least_one("threads", threads)
    if block_bytes is not None:
        named["block_bytes"] = _at_least_one("block_bytes", block_bytes)
    if compiler is not None:
        named["compiler"] = _compiler(compiler)
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
        _defaults.append(Options(_threads(), 2**22, "none"))
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


def _compiler(name: object) -> str:
    if not isinstance(name, str) or name not in COMPILERS:
        raise ValueError(f"compiler must be one of {', '.join(map(repr, COMPILERS))}, got {name!r:.40}")
    return name
