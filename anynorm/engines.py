"""The libraries that compile: how arrays go to one and come back, and what it makes of a function."""

import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from types import FunctionType
from typing import Any, NamedTuple, Protocol

from anynorm.arrays import empty, library_of, moved, writeable
from anynorm.kernels import Array, Namespace
from anynorm.library import Library

Arrays = Sequence[Array | None]
Compiled = Callable[[list[Array | None], Array | None], Sequence[Array]]
MOST_LENGTHS = 256
"""So many lengths of the first axis are remembered, of each function."""
AT_ONCE = 256
"""So many operations make up a value for each group; above inductor's own 30 it would be an array between two loops."""


class Compiler(Protocol):
    """A library as a compiler."""

    name: str
    library: Library
    xp: Namespace

    def exact(self, dtype: str) -> AbstractContextManager[Any]:
        """Where arrays of this dtype keep it."""

    def beside(self, library: Library, x: Array) -> AbstractContextManager[Any]:
        """Where what is computed waits for what the other library is still computing, and is waited for in turn."""

    def enter(self, library: Library, x: Array, shape: tuple[int, ...]) -> Array:
        """An array of another library as one of this, of this shape and without gaps."""

    def leave(self, library: Library, x: Array, like: Array) -> Array:
        """An array of this library as one of another, beside `like`."""

    def place(self, library: Library, out: Array, arrays: Arrays) -> Array | None:
        """`out`, if what is made of the arrays can be written straight to it."""

    def empty(self, library: Library, shape: tuple[int, ...], dtype: Any, like: Array) -> Array | None:
        """An array of the other library that the result is written to, if there is to be one."""

    def state(self, x: Array) -> Hashable:
        """What else a compiled function depends upon."""

    def stored(self, x: Array) -> Array:
        """A value that is computed once, and not again for each number that it is used with."""

    def sums_well(self, x: Array) -> bool:
        """Whether a sum over any axes at once is fast and exact."""

    def compile(self, body: Callable[..., Any], *, rows: bool, large: bool) -> Compiled:
        """The function of the arrays that writes the first result to a place, unless that is None.

        `rows` says that a group is all that lies side by side, and `large` that threads are worth it, whatever length
        of the first axis it is compiled for.
        """


class _Torch:
    """`torch.compile`: C++ on a CPU, Triton on a GPU."""

    name = "torch"

    def __init__(self) -> None:
        self.torch = load("torch", "PyTorch")
        self.library = library_of("x", self.torch.empty(0))
        self.xp = self.library.xp

    def exact(self, dtype: str) -> AbstractContextManager[Any]:  # noqa: ARG002
        return nullcontext()

    def beside(self, library: Library, x: Array) -> AbstractContextManager[Any]:
        if library.name != "cupy":
            return nullcontext()
        theirs, cuda = sys.modules["cupy"].cuda.get_current_stream().ptr, self.torch.cuda
        if theirs == cuda.current_stream(x.device.id).cuda_stream:
            return nullcontext()
        stream: AbstractContextManager[Any] = cuda.stream(cuda.ExternalStream(theirs, device=x.device.id))
        return stream

    def enter(self, library: Library, x: Array, shape: tuple[int, ...]) -> Array:
        if library.name == "torch":
            x = x.detach()
        elif library.name != "numpy":
            x = self.torch.from_dlpack(x)
        else:
            even = x.flags.c_contiguous or all(step >= 0 and step % x.itemsize == 0 for step in x.strides)
            if not even or not x.dtype.isnative:
                x = x.astype(x.dtype.newbyteorder("="))
            if name_of(x.dtype) == "bfloat16":
                x = self.torch.from_numpy(writeable(x.view("int16"))).view(self.torch.bfloat16)
            else:
                x = self.torch.from_numpy(writeable(x))
        return (x if x.shape == shape else x.reshape(shape)).contiguous()

    def leave(self, library: Library, x: Array, like: Array) -> Array:
        if library.name == "torch":
            return x
        if library.name == "numpy":
            return x.view(self.torch.int16).numpy().view("bfloat16") if x.dtype == self.torch.bfloat16 else x.numpy()
        return moved("x", library.xp.from_dlpack(x), like)

    def place(self, library: Library, out: Array, arrays: Arrays) -> Array | None:
        alone = not any(each is not None and library.overlap(each, out) for each in arrays)
        native = library.name != "numpy" or out.dtype.isnative
        return out if alone and native and library.contiguous(out) else None

    def empty(self, library: Library, shape: tuple[int, ...], dtype: Any, like: Array) -> Array | None:
        if library.name == "numpy":
            return library.xp.empty(shape, dtype=dtype.newbyteorder("="))
        return empty(shape, like, dtype) if library.name in ("torch", "cupy") else None

    def state(self, x: Array) -> Hashable:
        return x.device, self.torch.get_num_threads(), self.torch.is_inference_mode_enabled()

    def stored(self, x: Array) -> Array:
        return self.torch.as_strided(x, x.shape, x.stride())

    def sums_well(self, x: Array) -> bool:
        return bool(x.device.type != "cpu")

    def compile(self, body: Callable[..., Any], *, rows: bool, large: bool) -> Compiled:
        torch = self.torch

        def target(arrays: list[Array | None], place: Array | None) -> Any:
            results = body(*arrays)
            if place is None:
                return results
            place.copy_(results[0])
            return results[1:]

        # torch.compile keeps its versions by code object, and refuses the ninth: each function has one of its own
        own = FunctionType(target.__code__.replace(), target.__globals__, target.__name__, None, target.__closure__)
        compiled = _Graphs(self.torch, own, rows=rows, large=large)

        def function(arrays: list[Array | None], place: Array | None) -> Sequence[Array]:
            with torch.no_grad():
                results = compiled(*arrays, place)
            return results if place is None else [place, *results]

        return function


class _Graphs:
    """A function through `torch.compile`, of arrays that are alike but for the length of the first axis.

    Its checks of the arguments take longer than a small array does. A graph that they have led to once is called
    without them where that length comes again.
    """

    def __init__(self, torch: Any, function: Callable[..., Any], *, rows: bool, large: bool) -> None:
        self.torch, self.rows, self.large = torch, rows, large
        self.compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=self._backend)
        self.last = threading.local()
        self.known: dict[int, _Graph] = {}

    def __call__(self, *arrays: Array | None) -> Sequence[Array]:
        first = arrays[0]
        graph = self.known.get(first.shape[0])  # type: ignore[union-attr]
        if graph is not None:
            return graph(arrays)
        for each in arrays:
            if each is not None and each.shape[0] > 1:
                self.torch._dynamo.mark_dynamic(each, 0)
        self.last.call = None
        try:
            results: Sequence[Array] = self.compiled(list(arrays[:-1]), arrays[-1])
        except self.torch._dynamo.exc.BackendCompilerFailed as error:
            if type(error.inner_exception).__name__ != "InvalidCxxCompiler":
                raise
            raise RuntimeError(
                "compiler='torch' needs a C++ compiler, and finds none: install one, such as g++, or name it in CXX"
            ) from None
        graph = None if self.last.call is None else _graph(arrays, results, *self.last.call)
        self.last.call = None
        if graph is not None:
            if len(self.known) >= MOST_LENGTHS:
                self.known.clear()
            self.known[first.shape[0]] = graph  # type: ignore[union-attr]
        return results

    def _backend(self, graph: Any, inputs: list[Array]) -> Callable[..., Any]:
        inductor = self.torch._dynamo.lookup_backend("inductor")
        config: Any = import_module("torch._inductor.config")
        changes: dict[str, Any] = {}
        if not any(getattr(each, "is_cuda", False) for each in inputs):
            changes["compile_threads"] = 1  # this one: a forked child has no other, and would wait for them
            if self.large:  # inductor also takes from its cache what was compiled for fewer rows, without threads
                changes["cpp.min_chunk_size"] = 1
        elif self.rows:  # one kernel then reads a row, and reads it again
            changes["realize_opcount_threshold"] = AT_ONCE
        with config.patch(changes):
            function = inductor(graph, inputs)

        def noted(*given: Any) -> Any:
            results = function(*given)
            self.last.call = function, given, results
            return results

        return noted


class _Graph(NamedTuple):
    """What was compiled, and what of the arguments it takes."""

    function: Callable[..., Sequence[Array]]
    given: list[tuple[int | None, Any]]
    """The number of an argument, or a length."""
    results: list[int]

    def __call__(self, arrays: Sequence[Array | None]) -> list[Array]:
        found = self.function(*[value if i is None else arrays[i] for i, value in self.given])
        return [found[i] for i in self.results]


def _graph(
    arrays: Sequence[Array | None],
    results: Sequence[Array],
    function: Callable[..., Sequence[Array]],
    given: Sequence[Any],
    found: Sequence[Array],
) -> _Graph | None:
    """By what it was given, and what came of it; None where that is not these arrays and results alone."""
    places = [_where(each, arrays) for each in given]
    these = [_where(each, found) for each in results]
    if None in these or any(i is None and not isinstance(each, int) for i, each in zip(places, given, strict=True)):
        return None
    sources = [(i, None if i is not None else each) for i, each in zip(places, given, strict=True)]
    return _Graph(function, sources, [i for i in these if i is not None])


def _where(value: Any, values: Sequence[Any]) -> int | None:
    return next((i for i, each in enumerate(values) if each is value), None)


class _Jax:
    """`jax.jit`; XLA compiles for each shape."""

    name = "jax"

    def __init__(self) -> None:
        self.jax = load("jax", "JAX")
        self.xp = self.jax.numpy
        self.library = library_of("x", self.xp.zeros(1))

    def exact(self, dtype: str) -> AbstractContextManager[Any]:
        return self.jax.enable_x64(True) if dtype == "float64" else nullcontext()

    def beside(self, library: Library, x: Array) -> AbstractContextManager[Any]:  # noqa: ARG002
        return nullcontext()

    def enter(self, library: Library, x: Array, shape: tuple[int, ...]) -> Array:
        if library.name == "torch":
            x = self.xp.from_dlpack(x.detach().contiguous())
        elif library.name == "numpy":
            x = x.astype(x.dtype.newbyteorder("="), order="C", copy=False)
            if name_of(x.dtype) == "bfloat16":
                x = self.jax.device_put(x, self.jax.devices("cpu")[0])
            else:
                x = self.xp.from_dlpack(writeable(x))
        elif library.name != "jax":
            x = self.xp.from_dlpack(x)
        return x if x.shape == shape else x.reshape(shape)

    def leave(self, library: Library, x: Array, like: Array) -> Array:
        if library.name == "jax":
            return x
        if library.name == "numpy":
            return writeable(library.xp.asarray(x))
        if library.name == "array_api_strict":  # which knows no DLPack of what is read-only
            x = writeable(x.__array__())
        return moved("x", library.xp.from_dlpack(x), like)

    def place(self, library: Library, out: Array, arrays: Arrays) -> Array | None:  # noqa: ARG002
        return None

    def empty(self, library: Library, shape: tuple[int, ...], dtype: Any, like: Array) -> Array | None:  # noqa: ARG002
        return None

    def state(self, x: Array) -> Hashable:  # noqa: ARG002
        return ()

    def stored(self, x: Array) -> Array:
        return x

    def sums_well(self, x: Array) -> bool:  # noqa: ARG002
        return False

    def compile(self, body: Callable[..., Any], *, rows: bool, large: bool) -> Compiled:  # noqa: ARG002
        compiled = self.jax.jit(body)
        return lambda arrays, place: compiled(*arrays)


def compiler_of(name: str) -> Compiler:
    """That of a name, made when it is first asked for."""
    with _lock:
        found = _compilers.get(name)
        if found is None:
            found = _compilers[name] = _Torch() if name == "torch" else _Jax()
        return found


def load(name: str, called: str) -> Any:
    """The library of a compiler; an ImportError of one sentence if it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(
            f"compiler={name!r} needs {called}, which is not installed: pip install 'anynorm[{name}]'"
        ) from None


@cache
def name_of(dtype: Any) -> str:
    """The name of a dtype, the same in every library; some have types for dtypes."""
    return getattr(dtype, "__name__", None) or str(dtype).rpartition(".")[2]


_compilers: dict[str, Compiler] = {}
_lock = threading.RLock()
