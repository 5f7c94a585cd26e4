"""The kernels through the compiler of a library: `torch.compile`, `jax.jit`, `cupy.fuse`.

Arrays of other libraries go to the compiler's and come back without a copy. What is compiled belongs to a class of
shapes: axes that are treated alike are one, and the first of what is left, as a rule the batch, may have any length.
"""

import math
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib import import_module
from types import FunctionType
from typing import Any, NamedTuple, Protocol

from anynorm import kernels, layouts
from anynorm.arrays import Library, empty, library_of, moved, writeable
from anynorm.calls import Call, Plan
from anynorm.kernels import Arithmetic, Array, Namespace, Spread, Standardized

Arrays = Sequence[Array | None]


def chosen(call: Call, arrays: list[Array]) -> str:
    """The compiler that the kernels are handed to with these arrays; "none" if another has them, or little is to do.

    CuPy's is not one of these: it makes `affine` alone.
    """
    name, plan = call.compiler, call.plan
    if name == "none" or not plan.library.present(*arrays):
        return "none"
    if name == "cupy":
        _load("cupy", "CuPy")
        if plan.library.name != "cupy":
            raise ValueError(f"compiler='cupy' takes arrays of cupy alone, got {plan.library.name}")
        return "none"
    known = _name(plan.dtype) in ("float32", "float64") and all(_name(each.dtype) in _FLOATS for each in arrays)
    return name if known and math.prod(plan.view.shape) > 1 else "none"


def safe(call: Call, name: str, x: Array) -> bool:
    """Whether what is compiled holds for numbers of any size; else the variance says whether to believe the result.

    XLA always needs it, as it divides by multiplying, and so do numbers that lie on a GPU.
    """
    return call.spread is not None or name != "torch" or not call.plan.library.readable(x)


def copied(call: Call) -> Array:
    """A copy of x, by the threads of PyTorch where these are at work anyway."""
    library, x = call.plan.library, call.x
    if call.compiler == "torch" and library.name == "numpy" and library.contiguous(x):
        compiler, copy = _compiler("torch"), library.xp.empty(x.shape, dtype=x.dtype)
        if compiler.place(library, copy, ()) is not None:
            place, values = (compiler.enter(library, each, x.shape) for each in (copy, x))
            place.copy_(values)
            return copy
    return library.xp.asarray(x, copy=True)


def affine(call: Call, xhat: Array) -> Array:
    """`kernels.affine`; with CuPy's compiler, in one kernel."""
    if call.compiler != "cupy" or call.plan.library.name != "cupy" or call.gamma is None or call.beta is None:
        return kernels.affine(xhat, call.gamma, call.beta)
    with _lock:
        if "cupy" not in _functions:
            _functions["cupy"] = _load("cupy", "CuPy").fuse(lambda *arrays: kernels.affine(*arrays))
    return _functions["cupy"](xhat, call.gamma, call.beta)


def normalize(call: Call, name: str, *, keep: bool) -> tuple[Array, Spread] | None:
    """The result of a call, of the caller's shape, in `out` if it may lie there; and its statistics.

    Where these are not to be kept, there is no mean, and no more than a bound below the variance, a fifth of it at
    least. None where numbers must be looked at more closely than what is compiled does.
    """
    plan, compiler = call.plan, _compiler(name)
    scaled = call.spread is None and safe(call, name, call.x)
    inner, counted = _name(plan.dtype), plan.groups.divisor != 1

    def body(x: Array, gamma: Array | None, beta: Array | None, *given: Array | None) -> Any:
        xp, kind = compiler.xp, x.dtype
        sums: Any = _Sums(form, compiler, x, counted=counted)
        x = xp.astype(x, getattr(xp, inner), copy=False)
        if given:
            spread, found = Spread(*given), ()
            xhat = kernels.less(x, spread) * compiler.stored(kernels.inverse_root(xp, spread.var + plan.eps, flat=1.0))
        elif scaled:
            of = _scaled(compiler, plan, x, sums)
            xhat, found = of.xhat, tuple(each for each in of.spread if each is not None)
        else:
            pivot = sums.pivot(xp, x) if plan.centred else None
            d, left, var = kernels.shifted(xp, x, pivot, groups=sums, centred=plan.centred)
            rstd = kernels.inverse_root(xp, var + plan.eps, flat=1.0 if plan.tiny else None)
            d = d if left is None else d - sums.kept(left)
            xhat = d * sums.kept(rstd)
            # sums, not means: one more loop over the groups would keep those over x from becoming one
            found = tuple(sums.sums)
        return xp.astype(kernels.affine(xhat, gamma, beta), kind, copy=False), *found

    arrays: Arrays = [call.x, call.gamma, call.beta, *(call.spread or ())]
    form = _form(plan, arrays)
    key = ("normalize", plan.eps, plan.centred, counted, scaled)
    place = None if call.out is None else compiler.place(plan.library, call.out, arrays)
    y, *found = _run(compiler, plan.library, form, inner, key, body, arrays, call.x.dtype, place)
    y = plan.library.xp.reshape(y, plan.layout.shape)
    if place is not None:
        y = call.out
    if call.spread is not None:
        return y, call.spread
    xp = plan.library.xp
    found = [xp.reshape(each, plan.spread.shape) for each in found]
    if scaled:
        return y, Spread(*found) if plan.centred else Spread(None, None, *found)
    if not plan.centred:
        return y, Spread(None, None, found[0] / plan.groups.divisor)
    few_sums, sums, squares = found
    if not _fair(plan.library, sums, squares, plan.groups.divisor):
        return None
    if not keep:
        return y, Spread(None, None, squares * (0.2 / plan.groups.divisor))
    left = sums / plan.groups.divisor
    var = squares / plan.groups.divisor - left * left
    few = math.prod(
        [len(range(form.view.shape[axis])[part]) for axis, part in zip(form.axes, form.sample, strict=True)]
    )
    return y, Spread(*kernels.renormalized(xp, few_sums / few, left), var)


def _fair(library: Library, sums: Array, squares: Array, divisor: float) -> bool:
    """Whether a pivot left no more of a mean than two standard deviations: the variance is exact then."""
    return library.least(squares - sums * (1.25 / divisor) * sums) >= 0


def gradients(
    call: Call, dy: Array, dtype: Any, shapes: Sequence[tuple[int, ...] | None], spread: Spread, name: str
) -> tuple[Array | None, ...] | None:
    """`pullbacks.pull`: the gradient of x in this dtype, if any, and those of parameters of these shapes.

    None where numbers must be looked at more closely than what is compiled does.
    """
    plan, compiler, given = call.plan, _compiler(name), call.spread is not None
    scaled = not given and safe(call, name, dy)
    inner, counted = _name(plan.dtype), plan.groups.divisor != 1
    outer = None if dtype is None else _name(dtype)
    pivoted = outer is not None and plan.centred and not (given or scaled)

    def body(dy: Array, x: Array | None, gamma: Array | None, *parts: Array | None) -> Any:
        xp = compiler.xp
        sums: Any = _Sums(form, compiler, dy, counted=counted)
        dy = xp.astype(dy, getattr(xp, inner), copy=False)
        x = None if x is None else xp.astype(x, getattr(xp, inner), copy=False)
        if scaled:
            of = _scaled(compiler, plan, x, sums)
        else:
            mean, rest, rstd = parts
            xhat = None if x is None else kernels.less(x, Spread(mean, rest, None)) * rstd
            of = Standardized(xhat, rstd, Spread(mean, rest, None))
        xhat, found = of.xhat, []
        if outer is not None:
            if pivoted:
                alone = kernels.alone(gamma, form.axes)
                g = dy if alone else kernels.affine(dy, gamma, None)
                g, left, _ = kernels.shifted(xp, g, sums.pivot(xp, g), groups=sums)
                leaning = Spread(None, None, sums.mean_product(xp, g, of.xhat))
                dx = kernels.upright(g - sums.kept(left), leaning, of)
                dx = kernels.affine(dx, gamma if alone else None, None)
            else:
                groups = None if given else sums
                dx = kernels.input_gradient(xp, dy, gamma, of, groups=groups, centred=plan.centred)
            found.append(xp.astype(dx, getattr(xp, outer), copy=False))
            if pivoted:
                found += sums.sums[1:3]
        for axes, factor in zip(roles, (xhat, None), strict=False):
            if axes is not None:
                found.append(sums.total(xp, kernels.affine(dy, factor, None) * 1.0, axes))
        return tuple(found)

    xp = plan.library.xp
    arrays = [dy, call.x, call.gamma]
    if not scaled:  # a root for each number, and not for each group, is what a compiler would make of the variance
        with plan.library.quiet():
            flat = 1.0 if plan.tiny or given else None
            arrays += [spread.mean, spread.rest, kernels.inverse_root(xp, spread.var + plan.eps, flat=flat)]
    form = _form(plan, arrays, shapes)
    roles = [None if shape is None else _ones(form.of(shape)) for shape in shapes]
    key = ("gradients", outer, plan.eps, plan.centred, counted, scaled, given, *roles)
    left = iter(_run(compiler, plan.library, form, inner, key, body, arrays, dtype, None))
    dx = None if dtype is None else xp.reshape(next(left), plan.view.shape)
    if pivoted:
        with plan.library.quiet():
            sums, squares = next(left), next(left)
            if not (_fair(plan.library, sums, squares, plan.groups.divisor) and plan.library.most(squares) < math.inf):
                return None
    return dx, *(None if shape is None else xp.reshape(next(left), shape) for shape in shapes)


def _scaled(compiler: "_Compiler", plan: Plan, x: Array, sums: Any) -> Standardized:
    finer, limits = compiler.library.subnormal, plan.limits
    subnormal = finer(x, limits.step * limits.further) if finer is not None and plan.tiny else None
    return kernels.standardize_scaled(
        compiler.xp, x, groups=sums, eps=plan.eps, centred=plan.centred, subnormal=subnormal
    )


class _Form(NamedTuple):
    """A class of shapes."""

    view: layouts.View
    splits: tuple[int, ...]
    """The lengths that the first axis is divided by, one after the other, before its sum is taken."""
    whole: bool
    """Whether nothing is left then."""
    sample: tuple[slice, ...]
    """Where along each axis of a group some of its values are found."""
    kind: Hashable
    """The class, said in full."""

    @property
    def axes(self) -> tuple[int, ...]:
        return self.view.axes

    @property
    def rows(self) -> tuple[int, ...]:
        """The axes, if groups are rows in memory that other arrays divide further: their sums share one loop then."""
        return self.axes if self._trailing and 1 < len(self.axes) < len(self.view.shape) else ()

    @property
    def apart(self) -> bool:
        """Whether the sums over groups and what is done with these are loops of their own."""
        return bool(self.axes) and (not self._trailing or bool(self.rows))

    @property
    def _trailing(self) -> bool:
        last = len(self.view.shape)
        return self.axes == tuple(range(last - len(self.axes), last))

    def of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What becomes of a shape beside the plan's view."""
        return shape if len(shape) == len(self.view.shape) else self.view.of(shape)


def _form(plan: Plan, arrays: Arrays, shapes: Sequence[tuple[int, ...] | None] = ()) -> _Form:
    """The form of a plan's view, beside the other arrays and arrays of these shapes."""
    beside = [tuple(each.shape) for each in arrays if each is not None]
    return _joined(plan.view.shape, plan.view.axes, (*beside, *(shape for shape in shapes if shape is not None)))


def _ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of length 1."""
    return tuple(axis for axis, n in enumerate(shape) if n == 1)


@lru_cache(maxsize=1024)
def _joined(shape: tuple[int, ...], axes: tuple[int, ...], beside: tuple[tuple[int, ...], ...]) -> _Form:
    view = layouts.joined(shape, axes, list(beside))
    n, radix = view.shape[0], 16 if view.shape[-1] >= _LANES else 256
    levels = 0
    while n >= 4096 * radix**levels:
        levels += 1
    splits, whole = (radix,) * levels, n % radix**levels == 0
    large = math.prod(view.shape) >= _LARGE
    sample = _sample(view, large)
    return _Form(view, splits, whole, sample, (view.axes, view.shape[1:], splits, whole, *map(str, sample), large))


def _sample(view: layouts.View, large: bool) -> tuple[slice, ...]:
    """Where along each axis of a group `FEW` of its values are found, or a few more."""
    found, left = [], FEW
    for axis in reversed(view.axes):
        n = view.shape[axis]
        if axis == 0:  # it may have any length, of which the start is sure
            start, step = 0, 1
        elif axis == len(view.shape) - 1:  # side by side in memory
            start, step = max(0, n - left) // 2, 1
        else:
            start, step = 0, max(1, n // left)
        found.append(slice(start, start + left * step, step) if left < n and (axis or large) else slice(None))
        left = max(1, left // n)
    return tuple(found[::-1])


class _Sums:
    """`Groups` for a form: its sums are exact, and in an order that compilers make good loops of; it keeps them."""

    def __init__(self, form: _Form, compiler: "_Compiler", x: Array, *, counted: bool) -> None:
        self.form, self.compiler, self.axes = form, compiler, form.axes
        self.divisor = float(math.prod([x.shape[axis] for axis in form.axes])) if counted else 1.0
        self.sums: list[Array] = []

    def mean(self, xp: Namespace, x: Array) -> Array:
        total = self.total(xp, x, self.axes)
        self.sums.append(total)
        return self.kept(total / self.divisor)

    def mean_product(self, xp: Namespace, x: Array, other: Array, *, ops: Arithmetic = kernels.PURE) -> Array:
        return self.mean(xp, ops.multiply(x, other))

    def pivot(self, xp: Namespace, x: Array) -> Array:
        """The mean of some of the values of each group."""
        some = [slice(None)] * len(x.shape)
        for axis, part in zip(self.axes, self.form.sample, strict=True):
            some[axis] = part
        values = x[tuple(some)]
        self.sums.append(xp.sum(values, axis=self.axes, keepdims=True))
        return self.kept(self.sums[-1] / math.prod([values.shape[axis] for axis in self.axes]))

    def kept(self, value: Array) -> Array:
        """A value for each group that is used in another loop than it comes from, where it would be computed again.

        In one loop they go without: what is stored would part it in two, and to read the numbers again costs more.
        """
        return self.compiler.stored(value) if self.form.apart else value

    def total(self, xp: Namespace, x: Array, axes: tuple[int, ...]) -> Array:
        """The sum over these axes, the innermost first."""
        if not axes or self.compiler.sums_well(x):
            return xp.sum(x, axis=axes, keepdims=True) if axes else x
        last = len(self.form.view.shape) - 1
        if axes == self.form.rows:
            kept = x.shape[: axes[0]]
            rows = xp.reshape(x, (*kept, math.prod([x.shape[axis] for axis in axes])))
            return xp.reshape(self._along(xp, rows), (*kept, *(1 for _ in axes)))
        for axis in reversed(axes):
            if axis == last:
                x = self._along(xp, x)
            elif axis == 0:
                x = self._leading(xp, x)
            else:
                block = 16 if x.shape[-1] >= _LANES else 256
                x = kernels.total(xp, x, axes=(axis,), block=block)
        return x

    def _along(self, xp: Namespace, x: Array) -> Array:
        """Over the last axis; in equal parts where a longer run is added at a third of the speed."""
        n = x.shape[-1]
        parts = -(-n // _RUN)
        if parts > 1 and self.form.apart and n % parts == 0:
            x = xp.sum(xp.reshape(x, (*x.shape[:-1], parts, n // parts)), axis=-1)
        return xp.sum(x, axis=-1, keepdims=True)

    def _leading(self, xp: Namespace, x: Array) -> Array:
        """Over the first axis, which may have any length: in equal parts, and what is left."""
        splits, whole = self.form.splits, self.form.whole
        part = math.prod(splits)
        rows = x.shape[0] // part
        head = xp.reshape(x if whole else x[: rows * part], (rows, *splits, *x.shape[1:]))
        for axis in range(len(splits), 0, -1):
            head = xp.sum(head, axis=axis)
        head = xp.sum(head, axis=0, keepdims=True)
        return head if whole else head + xp.sum(x[rows * part :], axis=0, keepdims=True)


def _run(
    compiler: "_Compiler",
    library: Library,
    form: _Form,
    inner: str,
    key: Hashable,
    body: Callable[..., Any],
    given: Arrays,
    dtype: Any,
    place: Array | None,
) -> list[Array]:
    """The results of the compiled body; the first, unless `dtype` is None, is of x's shape and goes to that place."""
    shape = form.view.shape
    with compiler.exact(inner):
        arrays = [None if each is None else compiler.enter(library, each, form.of(each.shape)) for each in given]
        # all that a version is good for, so that the compiler never makes a second one of its own accord
        key = (
            *(compiler.name, inner, key, form.kind),
            *(None if each is None else (_name(each.dtype), *(n == 1 for n in each.shape)) for each in arrays),
            compiler.state(arrays[0]),
        )
        function = _functions.get(key)
        if function is None:
            with _lock:
                function = _functions.get(key) or _functions.setdefault(key, compiler.compile(body))
        if place is not None:
            place = compiler.enter(library, place, shape)
        elif dtype is not None:
            place = compiler.empty(library, shape, dtype, arrays[0])
        return [compiler.leave(library, each, given[0]) for each in function(arrays, place)]


class _Compiler(Protocol):
    """A library as a compiler."""

    name: str
    library: Library
    xp: Namespace

    def exact(self, dtype: str) -> AbstractContextManager[Any]:
        """Where arrays of this dtype keep it."""

    def enter(self, library: Library, x: Array, shape: tuple[int, ...]) -> Array:
        """An array of another library as one of this, of this shape and without gaps."""

    def leave(self, library: Library, x: Array, like: Array) -> Array:
        """An array of this library as one of another, beside `like`."""

    def place(self, library: Library, out: Array, arrays: Arrays) -> Array | None:
        """`out`, if what is made of the arrays can be written straight to it."""

    def empty(self, library: Library, shape: tuple[int, ...], dtype: Any, x: Array) -> Array | None:
        """A place that the result is written to, if there is to be one."""

    def state(self, x: Array) -> Hashable:
        """What else a compiled function depends upon."""

    def stored(self, x: Array) -> Array:
        """A value that is computed once, and not again for each number that it is used with."""

    def sums_well(self, x: Array) -> bool:
        """Whether a sum over any axes at once is fast and exact."""

    def compile(self, body: Callable[..., Any]) -> Callable[[list[Array | None], Array | None], Sequence[Array]]:
        """The function of the arrays that writes the first result to the place, if that is not None."""


class _Torch:
    """`torch.compile`: C++ on a CPU, Triton on a GPU."""

    name = "torch"

    def __init__(self) -> None:
        self.torch = _load("torch", "PyTorch")
        self.library = library_of("x", self.torch.empty(0))
        self.xp = self.library.xp

    def exact(self, dtype: str) -> AbstractContextManager[Any]:  # noqa: ARG002
        return nullcontext()

    def enter(self, library: Library, x: Array, shape: tuple[int, ...]) -> Array:
        if library.name == "torch":
            x = x.detach()
        elif library.name != "numpy":
            x = self.torch.from_dlpack(x)
        else:
            even = x.flags.c_contiguous or all(step >= 0 and step % x.itemsize == 0 for step in x.strides)
            if not even or not x.dtype.isnative:
                x = x.astype(x.dtype.newbyteorder("="))
            if _name(x.dtype) == "bfloat16":
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
        native = library.name == "torch" or (library.name == "numpy" and out.dtype.isnative)
        return out if alone and native and library.contiguous(out) else None

    def empty(self, library: Library, shape: tuple[int, ...], dtype: Any, x: Array) -> Array | None:
        if library.name == "numpy":  # which asks for huge pages
            return self.enter(library, library.xp.empty(shape, dtype=dtype.newbyteorder("=")), shape)
        return empty(shape, x, getattr(self.torch, _name(dtype)))

    def state(self, x: Array) -> Hashable:
        return str(x.device), self.torch.get_num_threads(), self.torch.is_inference_mode_enabled()

    def stored(self, x: Array) -> Array:
        return self.torch.as_strided(x, x.shape, x.stride())

    def sums_well(self, x: Array) -> bool:
        return bool(x.device.type != "cpu")

    def compile(self, body: Callable[..., Any]) -> Callable[[list[Array | None], Array | None], Sequence[Array]]:
        torch = self.torch

        def target(arrays: list[Array | None], place: Array | None) -> Any:
            results = body(*arrays)
            if place is None:
                return results
            place.copy_(results[0])
            return results[1:]

        # torch.compile keeps its versions by code object, and refuses the ninth: each function has one of its own
        own = FunctionType(target.__code__.replace(), target.__globals__, target.__name__, None, target.__closure__)
        compiled = _Graphs(self.torch, own)

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

    def __init__(self, torch: Any, function: Callable[..., Any]) -> None:
        self.torch = torch
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
        results: Sequence[Array] = self.compiled(list(arrays[:-1]), arrays[-1])
        graph = None if self.last.call is None else _graph(arrays, results, *self.last.call)
        self.last.call = None
        if graph is not None:
            if len(self.known) >= MOST_LENGTHS:
                self.known.clear()
            self.known[first.shape[0]] = graph  # type: ignore[union-attr]
        return results

    def _backend(self, graph: Any, inputs: list[Array]) -> Callable[..., Any]:
        function = self.torch._dynamo.lookup_backend("inductor")(graph, inputs)

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
        self.jax = _load("jax", "JAX")
        self.xp = self.jax.numpy
        self.library = library_of("x", self.xp.zeros(1))

    def exact(self, dtype: str) -> AbstractContextManager[Any]:
        return self.jax.enable_x64(True) if dtype == "float64" else nullcontext()

    def enter(self, library: Library, x: Array, shape: tuple[int, ...]) -> Array:
        if library.name == "torch":
            x = self.xp.from_dlpack(x.detach().contiguous())
        elif library.name == "numpy":
            x = x.astype(x.dtype.newbyteorder("="), order="C", copy=False)
            if _name(x.dtype) == "bfloat16":
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

    def empty(self, library: Library, shape: tuple[int, ...], dtype: Any, x: Array) -> Array | None:  # noqa: ARG002
        return None

    def state(self, x: Array) -> Hashable:  # noqa: ARG002
        return ()

    def stored(self, x: Array) -> Array:
        return x

    def sums_well(self, x: Array) -> bool:  # noqa: ARG002
        return False

    def compile(self, body: Callable[..., Any]) -> Callable[[list[Array | None], Array | None], Sequence[Array]]:
        compiled = self.jax.jit(body)
        return lambda arrays, place: compiled(*arrays)


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


@cache
def _name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


_compilers: dict[str, _Compiler] = {}
_functions: dict[Hashable, Callable[..., Any]] = {}
_lock = threading.RLock()
_FLOATS = ("bfloat16", "float16", "float32", "float64")
"""The dtypes of what is compiled, in the byte order of the machine."""
FEW = 32
"""So many values of a group tell its mean well enough for a pivot."""
_LANES = 16
"""A row of fewer numbers is added number by number, and short parts only cost."""
_RUN = 4096
"""The longest run that inductor adds without a stack of partial sums."""
MOST_LENGTHS = 256
_LARGE = 2**15
"""From so many numbers on a compiler should make use of threads; it decides once."""
