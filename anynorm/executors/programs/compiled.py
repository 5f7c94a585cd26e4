"""Numba: the words that the text of a program is written in, what is made of it, and where that is kept.

Numba is imported here alone, when a call first wants it.
"""

import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

READ = {
    "float16": ("half", None),
    "bfloat16": ("bfloat", None),
    "float32": ("float", None),
    "float64": ("double", None),
    "bool": ("i8", False),
    **{f"{sign}int{bits}": (f"i{bits}", sign == "") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
"""The dtypes that a program reads: the type of LLVM, and for a whole number whether it has a sign."""
WRITTEN = ("float16", "bfloat16", "float32", "float64")
PLACES = 48
"""So many arrays a program has at most; it is told that none of them overlap."""


class State(NamedTuple):
    """Whether there is a numba to compile with."""

    version: str | None
    why: str
    """Why not, in a few words; "" where there is one."""


@cache
def state() -> State:
    """Whether numba can be imported; it refuses a NumPy that is newer than it knows."""
    if "numba" not in sys.modules and not threading.main_thread().is_alive():
        return State(
            None, "cannot be imported any more: the interpreter exits"
        )  # it would be taken apart before its parts
    try:
        import numba
    except ModuleNotFoundError as error:
        missing = error.name == "numba"
        return State(None, "is not installed" if missing else f"cannot be imported: {error}")
    except Exception as error:
        return State(None, f"cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    return State(numba.__version__, "")


@cache
def readable() -> frozenset[str]:
    """The dtypes that programs read here: float16 only where the processor knows it."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    half = features.get("f16c", False) or llvm.get_process_triple().startswith(("aarch64", "arm64"))
    return frozenset(name for name in READ if half or name != "float16")


def cache_folder() -> Path | None:
    """Where the text of programs is kept, and by numba what it made of them; None where nothing can be written."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    if named:
        folder = Path(named) / "anynorm"
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or tempfile.gettempdir()) / "anynorm" / "cache"
    elif sys.platform == "darwin":
        folder = Path("~/Library/Caches/anynorm").expanduser()
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "anynorm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):
        return None


def function_of(name: str, text: str, sizes: int, arrays: int) -> Callable[..., int]:
    """The function of this name that the text defines.

    Its arguments are start, stop, part, low, high, offset, the sizes, eps, divisor and the arrays: their addresses, or
    objects that have these at the offset. It returns 1, and has done nothing, where one lies at an odd address.
    """
    import numba

    def made(path: str, *, keep: bool) -> Callable[..., int]:
        scope: dict[str, Any] = {**_words(), "__name__": __name__}  # numba looks the module up when it reads its cache
        exec(compile(text, path, "exec"), scope)  # it was printed by `cpu`, not read from the file
        whole, real = numba.int64, numba.float64
        signature = whole(*([whole] * (6 + sizes)), real, real, *([whole] * arrays))
        how: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": keep, "no_cfunc_wrapper": True}
        (made,) = numba.njit(signature, **how)(scope[name]).overloads.values()
        function: Callable[..., int] = getattr(made, "entry_point")  # noqa: B009 - the dispatcher would look at the type of each argument
        return function

    path = _kept(name, text)
    if path is not None:
        try:
            return made(path, keep=True)
        except Exception:  # the disk is full, or what is kept there is damaged: numba raises whatever it meets
            pass
    return made(f"<{name}>", keep=False)


def _kept(name: str, text: str) -> str | None:
    """The file that holds the text, written unless it is there."""
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / f"{name}_{hashlib.sha256((_version() + text).encode()).hexdigest()[:20]}.py"
    try:
        if not path.exists() or path.read_text() != text:
            with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
                file.write(text)
            os.replace(file.name, path)
    except OSError:
        return None
    return str(path)


@cache
def _version() -> str:
    """What the words mean."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


@cache
def _words() -> dict[str, Any]:
    """The functions that a program calls: `load_float32(address, index, place)`, `store_...`, `plus` and `sqrt`."""
    from math import sqrt

    import numpy as np
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    kinds = {"half": ir.HalfType(), "float": ir.FloatType(), "double": ir.DoubleType(), "bfloat": ir.IntType(16)}
    kinds |= {f"i{bits}": ir.IntType(bits) for bits in (8, 16, 32, 64)}
    double, single, word = ir.DoubleType(), ir.FloatType(), ir.IntType(32)

    def placed(builder: Any, instruction: Any, place: int) -> None:
        """Say that what lies in one place is read and written there alone."""
        module = builder.module
        known = module.__dict__.setdefault("anynorm_places", [])
        if not known:
            domain = module.add_metadata(["anynorm"])
            known += [module.add_metadata([f"anynorm {i}", domain]) for i in range(PLACES)]
            own = [module.add_metadata([each]) for each in known]
            others = [module.add_metadata(known[:i] + known[i + 1 :]) for i in range(PLACES)]
            known[:] = list(zip(own, others, strict=True))
        own, others = known[place]
        instruction.set_metadata("alias.scope", own)
        instruction.set_metadata("noalias", others)

    def at(builder: Any, address: Any, index: Any, kind: Any) -> Any:
        return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])

    def widened(builder: Any, value: Any, name: str) -> Any:
        kind, signed = READ[name]
        if kind == "bfloat":
            bits = builder.shl(builder.zext(value, word), word(16))
            return builder.fpext(builder.bitcast(bits, single), double)
        if signed is not None:
            return (builder.sitofp if signed else builder.uitofp)(value, double)
        return value if kind == "double" else builder.fpext(value, double)

    def narrowed(builder: Any, value: Any, name: str) -> Any:
        if name == "float64":
            return value
        value = builder.fptrunc(value, single)
        if name == "float32":
            return value
        if name == "float16":
            return builder.fptrunc(value, ir.HalfType())
        bits = builder.bitcast(value, word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.add(bits, builder.add(odd, word(0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", value, value)
        bits = builder.select(is_nan, word(0x7FC00000), rounded)
        return builder.trunc(builder.lshr(bits, word(16)), ir.IntType(16))

    def load(name: str) -> Any:
        @intrinsic(prefer_literal=True)
        def function(_: Any, address: Any, index: Any, place: Any) -> Any:  # noqa: ARG001
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
                value = builder.load(at(builder, arguments[0], arguments[1], kinds[READ[name][0]]))
                placed(builder, value, place.literal_value)
                return widened(builder, value, name)

            return types.float64(types.int64, types.int64, place), generate

        return function

    def store(name: str) -> Any:
        @intrinsic(prefer_literal=True)
        def function(_: Any, address: Any, index: Any, value: Any, place: Any) -> Any:  # noqa: ARG001
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
                target = at(builder, arguments[0], arguments[1], kinds[READ[name][0]])
                placed(builder, builder.store(narrowed(builder, arguments[2], name), target), place.literal_value)
                return context.get_dummy_value()

            return types.void(types.int64, types.int64, types.float64, place), generate

        return function

    @intrinsic
    def plus(_: Any, total: Any, value: Any) -> Any:  # noqa: ARG001
        """A term of a sum, whose terms may be added in any order; nothing else of a program may be reordered."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
            return builder.fadd(*arguments, flags=("reassoc",))

        return types.float64(types.float64, types.float64), generate

    @intrinsic
    def where(_: Any, condition: Any, value: Any, other: Any) -> Any:  # noqa: ARG001
        """One of two numbers, without a branch."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
            return builder.select(*arguments)

        return types.float64(types.boolean, types.float64, types.float64), generate

    @intrinsic
    def located(_: Any, address: Any, offset: Any) -> Any:  # noqa: ARG001
        """An address; if there is an offset, that which is written so many bytes behind it."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
            address, offset = arguments
            whole = kinds["i64"]
            place = builder.alloca(whole)
            builder.store(address, place)
            written = builder.inttoptr(builder.add(address, offset), whole.as_pointer())
            direct = builder.icmp_signed("==", offset, whole(0))
            return builder.load(builder.select(direct, place, written))

        return types.int64(types.int64, types.int64), generate

    words: dict[str, Any] = {f"load_{name}": load(name) for name in READ} | {
        f"store_{name}": store(name) for name in WRITTEN
    }
    return words | {"where": where, "located": located, "plus": plus, "sqrt": sqrt, "empty": np.empty}


lock = threading.RLock()
"""Held while a program is compiled: many threads that ask at once compile once."""


def _renew() -> None:
    global lock
    lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
