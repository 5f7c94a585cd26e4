"""Who does the work: a copy, the formula typed by hand, a library's own kernel, and anynorm on each library."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import formula
from devices import TITLES, Device, Run
from formula import EPS, Array, Arrays
from works import Work

import anynorm


class Candidate(NamedTuple):
    """A way to do a work."""

    name: str
    library: str
    """Whose arrays it is given."""
    prepare: Callable[[Work, Arrays, Device], Run | None]
    """All that is to be done but once; None if such a work is not for it."""
    engine: str = "auto"
    """Of `anynorm.options`."""
    formula: str = ""
    """The name of the candidate that is the formula typed by hand, run in the same way."""


COPY = "copy"
PEER = "torch.nn.functional"
ENGINES = {("cpu", "numpy"): ("numba", "arrays"), ("cpu", "torch"): ("numba",)}
"""Those that are measured, at every size; elsewhere there is one."""


def candidates(device: str, libraries: tuple[str, ...]) -> list[Candidate]:
    """Those on a device, of these libraries; the copy always is one."""
    home = "numpy" if device == "cpu" else "torch"
    found = [Candidate(COPY, home, _copy)]
    compiled = ("torch.compile",) if device == "cpu" and "torch" in libraries else ()
    for way in (*libraries, *compiled):
        if (device, way) != ("cpu", "torch"):
            name = _formula_of(way)
            found.append(Candidate(name, way.removesuffix(".compile"), _FORMULA[way], formula=name))
    if "torch" in libraries:
        found.append(Candidate(PEER, "torch", _native))
    for library in libraries:
        for engine in ENGINES.get((device, library), ("auto",)):
            name = f"anynorm, {_title(library)}" + ("" if engine == "auto" else f", {engine}")
            work, hand = _jit(_anynorm) if library == "jax" else _eager, _formula_of(library)
            found.append(Candidate(name, library, work, engine, hand))
            if library == "torch":
                found.append(Candidate(f"{name}, autograd", library, _recorded, engine, hand))
    for way in compiled:
        found.append(Candidate(f"anynorm, {way}", "torch", _torch_compile(_anynorm), formula=_formula_of(way)))
    return found


def _formula_of(way: str) -> str:
    return f"formula, {_title(way)}"


def _title(way: str) -> str:
    return "jax.jit" if way == "jax" else TITLES.get(way, way)


def _copy(work: Work, arrays: Arrays, device: Device) -> Run:
    del work, device
    copy = arrays.x.clone if hasattr(arrays.x, "clone") else arrays.x.copy
    return lambda: (copy(),)


# A function is from x, gamma and, where the norm has one, beta to y.
Function = Callable[..., Array]


def _formula(work: Work, arrays: Arrays, xp: Any) -> Function:
    return formula.forward(work, xp, arrays)


def _anynorm(work: Work, arrays: Arrays, xp: Any = None) -> Function:
    del xp
    norm, options = getattr(anynorm, work.norm), _options(work, arrays)
    return lambda *differentiated: norm(*differentiated, **options)


def _options(work: Work, arrays: Arrays) -> dict[str, Any]:
    given = {"moments": anynorm.RunningStats(arrays.mean, arrays.var)} if work.inference else {}
    return work.options | given | ({"weights": arrays.weights} if work.masked else {})


def _by_hand(library: str) -> Callable[[Work, Arrays, Device], Run]:
    """The formula, and the gradient by the chain rule, as one types them where nobody differentiates."""

    def prepare(work: Work, arrays: Arrays, device: Device) -> Run:
        del device
        xp = import_module(library)
        if work.gradient:
            return lambda: formula.gradient(work, xp, arrays)
        y = _formula(work, arrays, xp)
        return lambda: (y(*arrays.differentiated(work)),)

    return prepare


def _formula_in_torch(work: Work, arrays: Arrays, device: Device) -> Run:
    del device
    return _torch_run(_formula(work, arrays, import_module("torch")), work, arrays)


def _torch_compile(function_of: Callable[..., Function]) -> Callable[[Work, Arrays, Device], Run]:
    """Under `torch.compile`; the gradient by autograd."""

    def prepare(work: Work, arrays: Arrays, device: Device) -> Run:
        del device
        torch = import_module("torch")
        # PyTorch counts all works as one function, of which it compiles eight and runs the others as they are
        import_module("torch._dynamo.config").recompile_limit = 1000
        return _torch_run(torch.compile(function_of(work, arrays, torch), dynamic=False), work, arrays)

    return prepare


def _native(work: Work, arrays: Arrays, device: Device) -> Run | None:
    del device
    if work.masked:
        return None
    torch = import_module("torch")
    return _torch_run(_NATIVE[work.norm](torch, work, arrays), work, arrays)


def _recorded(work: Work, arrays: Arrays, device: Device) -> Run | None:
    del device
    return _torch_run(_anynorm(work, arrays), work, arrays) if work.gradient else None


def _eager(work: Work, arrays: Arrays, device: Device) -> Run:
    """As it is called; the gradient by `vjp`."""
    del device
    differentiated = arrays.differentiated(work)
    if not work.gradient:
        y = _anynorm(work, arrays)
        return lambda: (y(*differentiated),)
    norm, options = getattr(anynorm, work.norm), _options(work, arrays)

    def both() -> tuple[Array, ...]:
        y, pullback = anynorm.vjp(norm, *differentiated, **options)
        return (y, *pullback(arrays.dy))

    return both


def _jit(function_of: Callable[..., Function]) -> Callable[[Work, Arrays, Device], Run]:
    """Under `jax.jit`; the gradient by `jax.vjp`."""

    def prepare(work: Work, arrays: Arrays, device: Device) -> Run:
        jax = import_module("jax")
        y, differentiated = function_of(work, arrays, jax.numpy), arrays.differentiated(work)
        if work.gradient:

            def both(dy: Array, *differentiated: Array) -> tuple[Array, ...]:
                value, pullback = jax.vjp(y, *differentiated)
                return (value, *pullback(dy))

            compiled, given = jax.jit(both), (arrays.dy, *differentiated)
        else:
            compiled, given = jax.jit(lambda *differentiated: (y(*differentiated),)), differentiated
        return _Compiled(compiled, given, at_once=device.name == "cpu")

    return prepare


class _Compiled:
    """A function of JAX, compiled, and what it is given."""

    def __init__(self, compiled: Any, given: tuple[Array, ...], *, at_once: bool) -> None:
        self._compiled, self._given = compiled, given
        self._at_once = at_once  # on a CPU JAX would compute several at a time

    def __call__(self) -> tuple[Array, ...]:
        results = self._compiled(*self._given)
        return import_module("jax").block_until_ready(results) if self._at_once else results

    def planned_memory(self) -> int:
        """What the compiler sets aside for the results and on the way to them, in bytes."""
        plan = self._compiled.lower(*self._given).compile().memory_analysis()
        return int(plan.output_size_in_bytes + plan.temp_size_in_bytes)


def _torch_run(y: Function, work: Work, arrays: Arrays) -> Run:
    """The gradient by autograd."""
    differentiated = arrays.differentiated(work)
    if not work.gradient:
        return lambda: (y(*differentiated),)
    torch = import_module("torch")
    leaves = [each.detach().requires_grad_() for each in differentiated]

    def both() -> tuple[Array, ...]:
        value = y(*leaves)
        return (value.detach(), *torch.autograd.grad(value, leaves, arrays.dy))

    return both


def _native_batch_norm(torch: Any, work: Work, arrays: Arrays) -> Function:
    given = (arrays.mean, arrays.var) if work.inference else (None, None)
    training = not work.inference
    return _channels_second(
        work, lambda x, *affine: torch.nn.functional.batch_norm(x, *given, *affine, training=training, eps=EPS)
    )


def _native_group_norm(torch: Any, work: Work, _: Arrays) -> Function:
    return _channels_second(work, lambda x, *affine: torch.nn.functional.group_norm(x, work.groups, *affine, eps=EPS))


def _channels_second(work: Work, function: Function) -> Function:
    """Channels last stay so in memory, and PyTorch has a kernel for them."""
    axis = work.channel_axis
    return function if axis == 1 else lambda x, *affine: function(x.movedim(axis, 1), *affine).movedim(1, axis)


_NATIVE: dict[str, Callable[[Any, Work, Arrays], Function]] = {
    "layer_norm": lambda torch, work, _: (
        lambda x, gamma, beta: torch.nn.functional.layer_norm(x, work.parameter_shape, gamma, beta, eps=EPS)
    ),
    "rms_norm": lambda torch, work, _: (
        lambda x, gamma: torch.nn.functional.rms_norm(x, work.parameter_shape, gamma, eps=EPS)
    ),
    "batch_norm": _native_batch_norm,
    "group_norm": _native_group_norm,
    "instance_norm": lambda torch, _work, _: (
        lambda x, gamma, beta: torch.nn.functional.instance_norm(x, weight=gamma, bias=beta, eps=EPS)
    ),
    "weight_norm": lambda torch, work, _: lambda v, g: torch._weight_norm(v, g.reshape(work.beside), 0),
}
_FORMULA = {
    "numpy": _by_hand("numpy"),
    "torch": _formula_in_torch,
    "jax": _jit(_formula),
    "torch.compile": _torch_compile(_formula),
    "cupy": _by_hand("cupy"),
}
