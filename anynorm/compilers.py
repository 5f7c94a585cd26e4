"""The kernels through the compiler of a library: `torch.compile`, `jax.jit`, `cupy.fuse`.

Arrays of other libraries go to the compiler's and come back without a copy. What is compiled belongs to a class of
shapes: neighbouring axes of one role are one run, and the first run, as a rule the batch, may have any length.
"""

import math
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from types import FunctionType
from typing import Any, NamedTuple, Protocol

from anynorm import kernels, settings
from anynorm.arrays import Library, library_of, move, writeable
from anynorm.calls import Call
from anynorm.kernels import Array, Groups, Namespace, Standardized

Arrays = Sequence[Array | None]


def chosen(call: Call) -> str:
    """The compiler that a call is to be handed to; "none" if another has it already, or it is lazy or trivial.

    What autograd records is left to PyTorch's compiler alone, which differentiates what it compiles.
    """
    if not all(
        call.library.present(each) for each in _given(call)
    ):  # first: options cannot be read under torch.compile
        return "none"
    name = settings.current().compiler
    if name == "none" or (name != "torch" and records(call)):
        return "none"
    return name if _name(call.dtype) in ("float32", "float64") and math.prod(call.x.shape) > 1 else "none"


def records(call: Call) -> bool:
    """Whether autograd records the call."""
    return call.library.name == "torch" and any(_tracked(each) for each in _given(call))


def normalize(call: Call, name: str, *, scaled: bool, keep: bool = False) -> tuple[Array, Standardized]:
    """The result of a call in the view of x, and what its kernel returns, but xhat only where one says `keep`."""
    if name == "cupy":
        return _fused(call)
    compiler, library = _compiler(name), call.library
    keep = keep and (call.gamma is not None or call.beta is not None or call.x.dtype != call.dtype)
    dtype, groups = _name(call.dtype), call.groups
    limits = kernels.limits(library.xp, call.dtype)
    tiny = call.eps < limits.eps
    flat = 1.0 if tiny else None
    finer = compiler.library.subnormal if tiny else None

    def body(x: Array, gamma: Array | None, beta: Array | None, mean: Array | None, var: Array | None) -> Any:
        xp, kind = compiler.xp, x.dtype
        sums: Any = _Sums(form, compiler, counted=groups.divisor != 1, x=x)
        x = xp.astype(x, getattr(xp, dtype), copy=False)
        if mean is not None:
            of = kernels.standardize_with(xp, x, mean, var, eps=call.eps)
            xhat, statistics = (x - mean) * compiler.stored(of.rstd), []
        elif scaled:
            below = None if finer is None else finer(x, limits.step * limits.further)
            of = kernels.standardize_scaled(xp, x, groups=sums, eps=call.eps, centred=call.centred, subnormal=below)
            xhat, statistics = of.xhat, [of.rstd, of.var] if of.mean is None else [of.rstd, of.var, of.mean]
        else:
            of = kernels.standardize(xp, x, groups=sums, eps=call.eps, centred=call.centred, flat=flat)
            for each in sums.means[:-1]:
                x = x - each
            # sums, not means: one more loop over the groups would keep those over x from becoming one
            xhat, statistics = x * (compiler.stored(of.rstd) if sums.spread else of.rstd), sums.sums
        y = xp.astype(kernels.affine(xhat, gamma, beta), kind, copy=False)
        return (y, xhat, *statistics) if keep else (y, *statistics)

    with compiler.exact(dtype):
        arrays = _entered(compiler, library, _arguments(call))
        form = _form(compiler, arrays, () if call.mean is not None else groups.axes)
        constants = (call.eps, call.centred, groups.divisor != 1, scaled, keep)
        written = [call.x.dtype, call.dtype] if keep else [call.x.dtype]
        results = _run(compiler, library, form, ("normalize", dtype, *constants), body, arrays, written)
        y, *statistics = (compiler.leave(library, each, call.x) for each in results)
    xhat = statistics.pop(0) if keep else y
    return y, _standardized(call, xhat, statistics, flat=flat, scaled=scaled)


def gradients(
    name: str,
    library: Library,
    dy: Array,
    gamma: Array | None,
    of: Standardized,
    *,
    groups: Groups | None,
    centred: bool,
    shapes: Sequence[tuple[int, ...] | None],
    dtype: Any,
) -> list[Array | None]:
    """The gradient of x in this dtype, and those of parameters of these shapes; all of it beside the view."""
    compiler = _compiler(name)
    counted, kind = groups is not None and groups.divisor != 1, _name(dtype)

    def body(xhat: Array, dy: Array, rstd: Array, gamma: Array | None) -> Any:
        xp = compiler.xp
        sums: Any = _Sums(form, compiler, counted=counted, x=xhat)
        dy = xp.astype(dy, xhat.dtype, copy=False)
        dx = kernels.input_gradient(
            xp, dy, gamma, Standardized(xhat, rstd, None, rstd), groups=groups and sums, centred=centred
        )
        found = [xp.astype(dx, getattr(xp, kind), copy=False)]
        for role, factor in zip(roles, (xhat, None), strict=False):
            if role is not None:
                found.append(sums.total(xp, kernels.affine(dy, factor, None) * 1.0, role))
        return tuple(found)

    with compiler.exact(_name(of.xhat.dtype)):
        arrays = _entered(compiler, library, [of.xhat, dy, of.rstd, gamma])
        form = _form(compiler, arrays, () if groups is None else groups.axes, shapes)
        roles = [None if shape is None else form.roles(shape) for shape in shapes]
        constants = (centred, counted, groups is None, kind, *roles)
        results = _run(compiler, library, form, ("gradients", *constants), body, arrays, [dtype])
        left = iter([compiler.leave(library, each, of.xhat) for each in results])
    return [next(left), *(None if shape is None else next(left) for shape in shapes)]


class _Form(NamedTuple):
    """A class of shapes: the axes of a view as they lie in memory, neighbours of one role made one run."""

    view: tuple[int, ...]
    order: tuple[int, ...]
    runs: tuple[tuple[int, ...], ...]
    axes: tuple[int, ...]
    """The runs that are averaged over."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of x in runs."""
        return tuple(math.prod([self.view[axis] for axis in run]) for run in self.runs)

    def roles(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The runs along which a parameter of this shape is broadcast."""
        return tuple(i for i, run in enumerate(self.runs) if all(shape[axis] == 1 for axis in run))

    def enter(self, xp: Namespace, x: Array) -> Array:
        """What is beside the view, in runs."""
        shape = tuple(math.prod([x.shape[axis] for axis in run]) for run in self.runs)
        return xp.reshape(x if self.order == tuple(sorted(self.order)) else xp.permute_dims(x, self.order), shape)

    def leave(self, xp: Namespace, x: Array) -> Array:
        """What is in runs, beside the view."""
        whole = {axis for i, run in enumerate(self.runs) for axis in run if x.shape[i] > 1}
        x = xp.reshape(x, tuple(self.view[axis] if axis in whole else 1 for axis in self.order))
        if self.order == tuple(sorted(self.order)):
            return x
        return xp.permute_dims(x, tuple(self.order.index(axis) for axis in range(len(self.order))))

    @property
    def splits(self) -> tuple[int, ...]:
        """The lengths that the first run is divided by, one after the other, before its sum is taken."""
        n, radix = self.shape[0], 16 if self.shape[-1] >= _LANES else 256
        levels = 0
        while n >= 4096 * radix**levels:
            levels += 1
        return (radix,) * levels

    @property
    def whole(self) -> bool:
        """Whether nothing is left then."""
        return self.shape[0] % math.prod(self.splits) == 0


class _Sums:
    """`Groups` for a form: its sums are exact, and in an order that compilers make good loops of; it keeps them."""

    block = None

    def __init__(self, form: _Form, compiler: "_Compiler", *, counted: bool, x: Array) -> None:
        self.form, self.compiler, self.axes = form, compiler, form.axes
        self.divisor = float(math.prod([x.shape[axis] for axis in form.axes])) if counted else 1.0
        self.spread = bool(form.axes) and form.axes[-1] < len(form.runs) - 1
        self.sums: list[Array] = []
        self.means: list[Array] = []

    def mean(self, xp: Namespace, x: Array) -> Array:
        total = self.total(xp, x, self.axes)
        mean = total / self.divisor
        if self.spread:
            mean = self.compiler.stored(mean)
        self.sums.append(total)
        self.means.append(mean)
        return mean

    def total(self, xp: Namespace, x: Array, axes: tuple[int, ...]) -> Array:
        """The sum over these runs, the innermost first."""
        if not axes or self.compiler.sums_well(x):
            return xp.sum(x, axis=axes, keepdims=True) if axes else x
        for axis in reversed(axes):
            if axis == len(self.form.runs) - 1:
                x = xp.sum(x, axis=axis, keepdims=True)
            elif axis == 0:
                x = self._leading(xp, x)
            else:
                block = 16 if x.shape[-1] >= _LANES else 256
                x = kernels.total(xp, x, axes=(axis,), block=block)
        return x

    def _leading(self, xp: Namespace, x: Array) -> Array:
        """Over the first run, which may have any length: in equal parts, and what is left."""
        splits = self.form.splits
        part = math.prod(splits)
        rows = x.shape[0] // part
        whole = self.form.whole
        head = xp.reshape(x if whole else x[: rows * part], (rows, *splits, *x.shape[1:]))
        for axis in range(len(splits), 0, -1):
            head = xp.sum(head, axis=axis)
        head = xp.sum(head, axis=0, keepdims=True)
        return head if whole else head + xp.sum(x[rows * part :], axis=0, keepdims=True)


def _form(
    compiler: "_Compiler", arrays: Arrays, axes: tuple[int, ...], shapes: Sequence[tuple[int, ...] | None] = ()
) -> _Form:
    """The form of a view that is averaged over `axes`, beside the other arrays and arrays of these shapes."""
    x, *others = (each for each in arrays if each is not None)
    view, order = tuple(x.shape), compiler.order(x)
    beside = [tuple(each.shape) for each in others] + [shape for shape in shapes if shape is not None]
    runs: list[tuple[int, ...]] = []
    last = None
    for axis in (each for each in order if view[each] > 1):
        role = (axis in axes, *(shape[axis] == 1 for shape in beside))
        if role == last:
            runs[-1] = (*runs[-1], axis)
        else:
            runs.append((axis,))
        last = role
    return _Form(view, order, tuple(runs), tuple(i for i, run in enumerate(runs) if run[0] in axes))


def _entered(compiler: "_Compiler", library: Library, arrays: Arrays) -> list[Array | None]:
    return [None if each is None else compiler.enter(library, each) for each in arrays]


def _run(
    compiler: "_Compiler",
    library: Library,
    form: _Form,
    key: Hashable,
    body: Callable[..., Any],
    arrays: Arrays,
    written: Sequence[Any],
) -> list[Array]:
    """The results of the compiled body, beside the view; the first of them have the shape of x and these dtypes."""
    arrays = [None if each is None else compiler.ready(form.enter(compiler.xp, each)) for each in arrays]
    # all that a version is good for, so that the compiler never makes a second one of its own accord
    key = (
        *(compiler.name, key, form.axes, form.shape[1:]),
        *(form.splits, form.whole, math.prod(form.shape) >= _LARGE),
        *(None if each is None else (_name(each.dtype), *(n == 1 for n in each.shape)) for each in arrays),
        compiler.state(arrays),
    )
    function = _functions.get(key)
    if function is None:
        with _lock:
            function = _functions.get(key) or _functions.setdefault(key, compiler.compile(body))
    return [form.leave(compiler.xp, each) for each in function(library, form.shape, arrays, written)]


class _Compiler(Protocol):
    """A library as a compiler."""

    name: str
    xp: Namespace
    library: Library

    def exact(self, dtype: str) -> AbstractContextManager[Any]:
        """Where arrays of this dtype keep it."""

    def enter(self, library: Library, x: Array) -> Array:
        """An array of another library as one of this."""

    def leave(self, library: Library, x: Array, like: Array) -> Array:
        """An array of this library as one of another, beside `like`."""

    def order(self, x: Array) -> tuple[int, ...]:
        """The axes in the order in which they lie in memory."""

    def ready(self, x: Array) -> Array:
        """Without gaps."""

    def state(self, arrays: Arrays) -> Hashable:
        """What else a compiled function depends upon."""

    def stored(self, x: Array) -> Array:
        """A value that is computed once, and not again for each number that it is used with."""

    def sums_well(self, x: Array) -> bool:
        """Whether a sum over any axes at once is fast and exact."""

    def compile(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """The function that `_run` calls."""


class _Torch:
    """`torch.compile`: C++ on a CPU, Triton on a GPU."""

    name = "torch"

    def __init__(self) -> None:
        self.torch = _load("torch", "PyTorch")
        self.library = library_of("x", self.torch.empty(0))
        self.xp = self.library.xp

    def exact(self, dtype: str) -> AbstractContextManager[Any]:  # noqa: ARG002
        return nullcontext()

    def enter(self, library: Library, x: Array) -> Array:
        if library.name == "torch":
            return x.view_as(x) if _tracked(x) else x.detach()
        if library.name != "numpy":
            return self.torch.from_dlpack(x)
        if any(step < 0 or step % x.itemsize for step in x.strides) or not x.dtype.isnative:
            x = x.astype(x.dtype.newbyteorder("="))
        if _name(x.dtype) == "bfloat16":
            return self.torch.from_numpy(writeable(x.view("int16"))).view(self.torch.bfloat16)
        return self.torch.from_numpy(writeable(x))

    def leave(self, library: Library, x: Array, like: Array) -> Array:
        if library.name == "torch":
            return x
        if library.name == "numpy":
            return x.view(self.torch.int16).numpy().view("bfloat16") if x.dtype == self.torch.bfloat16 else x.numpy()
        return move(library.xp.from_dlpack(x), like)

    def order(self, x: Array) -> tuple[int, ...]:
        steps = x.stride()
        return tuple(sorted(range(x.ndim), key=lambda axis: -steps[axis])) if 0 not in steps else tuple(range(x.ndim))

    def ready(self, x: Array) -> Array:
        return x.contiguous()

    def state(self, arrays: Arrays) -> Hashable:
        tracked = tuple(each is not None and _tracked(each) for each in arrays)
        return str(arrays[0].device), self.torch.get_num_threads(), self.torch.is_inference_mode_enabled(), tracked  # type: ignore[union-attr]

    def stored(self, x: Array) -> Array:
        return x if x.requires_grad else self.torch.as_strided(x, x.shape, x.stride())

    def sums_well(self, x: Array) -> bool:
        return bool(x.device.type != "cpu")

    def compile(self, body: Callable[..., Any]) -> Callable[..., Any]:
        torch = self.torch

        def target(outs: list[Array], arrays: list[Array]) -> Any:
            results = body(*arrays)
            for out, each in zip(outs, results, strict=False):
                out.copy_(each)
            return results[len(outs) :]

        # torch.compile keeps its versions by code object, and refuses the ninth: each function has one of its own
        own = FunctionType(target.__code__.replace(), target.__globals__, target.__name__, None, target.__closure__)
        compiled = torch.compile(own, fullgraph=True, dynamic=False)

        def function(
            library: Library, shape: tuple[int, ...], arrays: list[Array], written: Sequence[Any]
        ) -> list[Array]:
            tracked = any(each is not None and _tracked(each) for each in arrays)
            outs = [] if tracked else [self._empty(library, shape, dtype, arrays[0]) for dtype in written]
            for each in (*arrays, *outs):
                if each is not None and each.shape[0] > 1:
                    torch._dynamo.mark_dynamic(each, 0)
            if not tracked:
                with torch.no_grad():
                    return [*outs, *compiled(outs, arrays)]
            with warnings.catch_warnings():  # while it compiles, torch looks for the gradient of what has none
                warnings.filterwarnings("ignore", message="The .grad attribute")
                return list(compiled(outs, arrays))

        return function

    def _empty(self, library: Library, shape: tuple[int, ...], dtype: Any, x: Array) -> Array:
        if library.name == "numpy":  # which asks for huge pages
            return self.enter(library, library.xp.empty(shape, dtype=dtype))
        return self.torch.empty(shape, dtype=getattr(self.torch, _name(dtype)), device=x.device)


class _Jax:
    """`jax.jit`; XLA compiles for each shape."""

    name = "jax"

    def __init__(self) -> None:
        self.jax = _load("jax", "JAX")
        self.xp = self.jax.numpy
        self.library = library_of("x", self.xp.zeros(1))

    def exact(self, dtype: str) -> AbstractContextManager[Any]:
        return self.jax.enable_x64(True) if dtype == "float64" else nullcontext()

    def enter(self, library: Library, x: Array) -> Array:
        if library.name == "jax":
            return x
        if library.name == "torch":
            return self.xp.from_dlpack(x.detach().contiguous())
        if library.name != "numpy":
            return self.xp.from_dlpack(x)
        x = x.astype(x.dtype.newbyteorder("="), order="C", copy=False)
        if _name(x.dtype) == "bfloat16":
            return self.jax.device_put(x, self.jax.devices("cpu")[0])
        return self.xp.from_dlpack(writeable(x))

    def leave(self, library: Library, x: Array, like: Array) -> Array:
        if library.name == "jax":
            return x
        if library.name == "numpy":
            return writeable(library.xp.asarray(x))
        if library.name == "array_api_strict":  # which knows no DLPack of what is read-only
            x = writeable(x.__array__())
        return move(library.xp.from_dlpack(x), like)

    def order(self, x: Array) -> tuple[int, ...]:
        return tuple(range(x.ndim))

    def ready(self, x: Array) -> Array:
        return x

    def state(self, arrays: Arrays) -> Hashable:  # noqa: ARG002
        return ()

    def stored(self, x: Array) -> Array:
        return x

    def sums_well(self, x: Array) -> bool:  # noqa: ARG002
        return False

    def compile(self, body: Callable[..., Any]) -> Callable[..., Any]:
        compiled = self.jax.jit(body)
        return lambda library, shape, arrays, written: list(compiled(*arrays))


def _fused(call: Call) -> tuple[Array, Standardized]:
    """On CuPy: the statistics by the kernels, and what follows in one elementwise kernel."""
    cupy = _load("cupy", "CuPy")
    if call.library.name != "cupy":
        raise ValueError(f"compiler='cupy' takes arrays of cupy alone, got {call.library.name}")
    xp = call.library.xp
    x = xp.astype(call.x, call.dtype, copy=False)
    if call.mean is not None:
        of = kernels.standardize_with(xp, x, call.mean, call.var, eps=call.eps)
    else:
        of = kernels.standardize_scaled(xp, x, groups=call.groups, eps=call.eps, centred=call.centred)
    parameters = [each for each in (call.gamma, call.beta) if each is not None]
    with _lock:
        function = _functions.get("cupy") or _functions.setdefault("cupy", cupy.fuse(kernels.affine))
    y = function(of.xhat, *parameters) if len(parameters) == 2 else kernels.affine(of.xhat, call.gamma, call.beta)
    return xp.astype(y, call.x.dtype, copy=False), of


def _compiler(name: str) -> _Compiler:
    with _lock:
        found = _compilers.get(name)
        if found is None:
            found = _compilers[name] = _Torch() if name == "torch" else _Jax()
        return found


def _load(name: str, called: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(
            f"compiler={name!r} needs {called}, which is not installed: pip install 'anynorm[{name}]'"
        ) from None


def _standardized(call: Call, xhat: Array, found: list[Array], *, flat: float | None, scaled: bool) -> Standardized:
    """What the kernel would have returned, from the statistics that the compiled one did."""
    if scaled:
        rstd, var, *rest = found
        return Standardized(xhat, rstd, rest[0] if rest else None, var)
    mean, var = call.mean, call.var
    if var is None:
        *means, var = (each / float(max(call.groups.divisor, 1)) for each in found)
        mean = means[0] + means[1] if means else None
    else:
        flat = 1.0
    return Standardized(xhat, kernels.inverse_root(call.library.xp, var + call.eps, flat=flat), mean, var)


def _arguments(call: Call) -> list[Array | None]:
    return [call.x, call.gamma, call.beta, call.mean, call.var]


def _given(call: Call) -> list[Array]:
    return [each for each in _arguments(call) if each is not None]


def _tracked(x: Array) -> bool:
    return bool(x.requires_grad) and bool(import_module("torch").is_grad_enabled())


@cache
def _name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


_compilers: dict[str, _Compiler] = {}
_functions: dict[Hashable, Callable[..., Any]] = {}
_lock = threading.RLock()
_LANES = 16
"""A row of fewer numbers is added number by number, and short parts only cost."""
_LARGE = 2**15
"""From here on a compiler should make use of threads; it decides once."""
