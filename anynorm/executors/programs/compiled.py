"""Numba: the functions that the text of a program is written in, what is made of it, and where that is kept.

Numba is imported here alone, when a call first wants it.
"""

import hashlib
import inspect
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache, partial
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
"""So many arrays a program has at most; the compiler knows that none of them overlap."""


class State(NamedTuple):
    """Whether there is a numba to compile with."""

    version: str | None
    why: str
    """Why not, in a few words; "" where there is one."""


@cache
def state() -> State:
    """Whether numba can be imported; it refuses a NumPy that is newer than it knows."""
    if "numba" not in sys.modules and not threading.main_thread().is_alive():
        return State(None, "cannot be imported any more: the interpreter exits")  # its parts would go before it
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


def function_of(name: str, text: str) -> Callable[..., int]:
    """The function of this name that the text defines.

    Its arguments are integers, but for the real numbers eps and divisor. An array is an address, or an object that has
    the address at the offset. It returns 1, and has done nothing, where an array lies at an odd address.
    """
    import numba

    def made(path: str, *, keep: bool) -> Callable[..., int]:
        scope: dict[str, Any] = {
            **_functions(),
            "__name__": __name__,
        }  # numba looks it up when it reads its cache
        exec(compile(text, path, "exec"), scope)  # it was printed by `cpu`, not read from the file
        reals, arguments = {"eps", "divisor"}, inspect.signature(scope[name]).parameters
        signature = numba.int64(*[numba.float64 if argument in reals else numba.int64 for argument in arguments])
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
        if not path.exists() or path.read_bytes() != text.encode():
            with tempfile.NamedTemporaryFile("wb", dir=folder, suffix=".tmp", delete=False) as file:
                file.write(text.encode())
            os.replace(file.name, path)
    except OSError:
        return None
    return str(path)


@cache
def _version() -> str:
    """What the functions are."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


@cache
def _functions() -> dict[str, Any]:
    """The functions that a program calls: `load_float32(address, index, place)`, `store_...`, `plus` and `sqrt`."""
    from math import sqrt

    import numpy as np
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    kinds = {"half": ir.HalfType(), "float": ir.FloatType(), "double": ir.DoubleType(), "bfloat": ir.IntType(16)}
    kinds |= {f"i{bits}": ir.IntType(bits) for bits in (8, 16, 32, 64)}
    double, single, word = ir.DoubleType(), ir.FloatType(), ir.IntType(32)
    whole, real = types.int64, types.float64

    def function(build: Callable[..., Any], result: Any, *arguments: Any) -> Any:
        """A function of these types, and of a place if `build`, which makes the instructions, takes one."""

        def made(_: Any, *given: Any) -> Any:
            places = given[len(arguments) :]

            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
                value = build(builder, *values[: len(arguments)], *(place.literal_value for place in places))
                return context.get_dummy_value() if result is types.void else value

            return result(*arguments, *places), generate

        setattr(made, "__signature__", inspect.signature(build))  # noqa: B010 - numba counts the arguments
        return intrinsic(prefer_literal=True)(made)

    def placed(builder: Any, instruction: Any, place: int) -> Any:
        """Say that what lies in one place is read and written there alone."""
        module = builder.module
        known = module.__dict__.setdefault("anynorm_places", [])
        if not known:
            domain = module.add_metadata(["anynorm"])
            scopes = [module.add_metadata([f"anynorm {i}", domain]) for i in range(PLACES)]
            for i, scope in enumerate(scopes):
                known.append((module.add_metadata([scope]), module.add_metadata(scopes[:i] + scopes[i + 1 :])))
        scope, others = known[place]
        instruction.set_metadata("alias.scope", scope)
        instruction.set_metadata("noalias", others)
        return instruction

    def at(builder: Any, address: Any, index: Any, name: str) -> Any:
        return builder.gep(builder.inttoptr(address, kinds[READ[name][0]].as_pointer()), [index])

    def load(name: str, builder: Any, address: Any, index: Any, place: int) -> Any:
        value = placed(builder, builder.load(at(builder, address, index, name)), place)
        kind, signed = READ[name]
        if kind == "bfloat":
            bits = builder.shl(builder.zext(value, word), word(16))
            return builder.fpext(builder.bitcast(bits, single), double)
        if signed is not None:
            return (builder.sitofp if signed else builder.uitofp)(value, double)
        return value if kind == "double" else builder.fpext(value, double)

    def store(name: str, builder: Any, address: Any, index: Any, value: Any, place: int) -> Any:
        if name != "float64":
            value = builder.fptrunc(value, single)
        if name == "float16":
            value = builder.fptrunc(value, kinds["half"])
        elif name == "bfloat16":
            bits = builder.bitcast(value, word)
            odd = builder.and_(builder.lshr(bits, word(16)), word(1))
            rounded = builder.add(bits, builder.add(odd, word(0x7FFF)))
            bits = builder.select(builder.fcmp_unordered("uno", value, value), word(0x7FC00000), rounded)
            value = builder.trunc(builder.lshr(bits, word(16)), kinds["bfloat"])
        return placed(builder, builder.store(value, at(builder, address, index, name)), place)

    def plus(builder: Any, total: Any, term: Any) -> Any:
        """A term of a sum, whose terms may be added in any order; nothing else of a program may be reordered."""
        return builder.fadd(total, term, flags=("reassoc",))

    def where(builder: Any, condition: Any, value: Any, other: Any) -> Any:
        """One of two numbers, without a branch."""
        return builder.select(condition, value, other)

    def located(builder: Any, address: Any, offset: Any) -> Any:
        """An address; if there is an offset, that which is written so many bytes behind it."""
        place = builder.alloca(kinds["i64"])
        builder.store(address, place)
        written = builder.inttoptr(builder.add(address, offset), kinds["i64"].as_pointer())
        direct = builder.icmp_signed("==", offset, kinds["i64"](0))
        return builder.load(builder.select(direct, place, written))

    functions = {f"load_{name}": function(partial(load, name), real, whole, whole) for name in READ}
    functions |= {f"store_{name}": function(partial(store, name), types.void, whole, whole, real) for name in WRITTEN}
    functions["where"] = function(where, real, types.boolean, real, real)
    functions["where_float32"] = function(where, types.float32, types.boolean, types.float32, types.float32)
    functions["plus"], functions["located"] = function(plus, real, real, real), function(located, whole, whole, whole)
    return functions | {"sqrt": sqrt, "empty": np.empty, "single": np.float32}


lock = threading.RLock()
"""Held while a program is compiled: many threads that ask at once compile once."""


def _renew() -> None:
    global lock
    lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
