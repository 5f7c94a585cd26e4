"""The kernels through the compiler of a library: `torch.compile`, `jax.jit`.

Arrays of other libraries go to the compiler's and come back without a copy. What is compiled belongs to a class of
shapes: axes that are treated alike are one, and the first of what is left, as a rule the batch, may have any length.
"""

import math
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

from anynorm import kernels, layouts
from anynorm.arrays import empty
from anynorm.calls import Call, Plan
from anynorm.engines import Arrays, Compiler, compiler_of, load, name_of
from anynorm.forms import Form, Sums, joined
from anynorm.kernels import Array, Spread, Standardized
from anynorm.library import Library


def chosen(call: Call, arrays: list[Array]) -> str:
    """The compiler that the kernels are handed to with these arrays; "none" if another has them, or little is to do.

    CuPy's is not one of these: its arrays are computed by programs of their own anyway.
    """
    name, plan = call.compiler, call.plan
    if name == "none" or not plan.library.present(*arrays):
        return "none"
    if name == "cupy":
        load("cupy", "CuPy")
        if plan.library.name != "cupy":
            raise ValueError(f"compiler='cupy' takes arrays of cupy alone, got {plan.library.name}")
        return "none"
    known = name_of(plan.dtype) in ("float32", "float64") and all(name_of(each.dtype) in _FLOATS for each in arrays)
    return name if known and math.prod(plan.view.shape) > 1 else "none"


def safe(call: Call, name: str, x: Array) -> bool:
    """Whether what is compiled holds for numbers of any size; else the variance says whether to believe the result.

    XLA always needs it, as it divides by multiplying, and so do numbers that lie on a GPU.
    """
    return call.spread is not None or name != "torch" or not call.plan.library.readable(x)


def wide(call: Call, name: str, x: Array) -> bool:
    """Whether the statistics are computed in float64, and are of this dtype: numbers of any size have squares there."""
    return (
        name == "torch" and call.spread is None and name_of(call.plan.dtype) == "float32" and call.plan.library.wide(x)
    )


def normalize(call: Call, name: str, *, keep: bool) -> tuple[Array, Spread] | None:
    """The result of a call, of the caller's shape, in `out` if it may lie there; and its statistics.

    Where these are not to be kept, there is no mean, and no more than a bound below the variance, a fifth of it at
    least. None where numbers must be looked at more closely than what is compiled does.
    """
    plan, compiler = call.plan, compiler_of(name)
    widened = wide(call, name, call.x)
    scaled = call.spread is None and not widened and safe(call, name, call.x)
    inner, counted = name_of(plan.dtype), plan.groups.divisor != 1

    def body(x: Array, gamma: Array | None, beta: Array | None, *given: Array | None) -> Any:
        xp, kind = compiler.xp, x.dtype
        sums: Any = Sums(form, compiler, x, counted=counted)
        x = xp.astype(x, getattr(xp, inner), copy=False)
        if given:
            spread, found = Spread(*given), ()
            xhat = kernels.less(x, spread) * compiler.stored(kernels.inverse_root(xp, spread.var + plan.eps, flat=1.0))
        elif widened:
            how: dict[str, Any] = {"axes": form.axes, "eps": plan.eps, "centred": plan.centred, "dtype": xp.float64}
            of = kernels.standardize_wide(xp, x, groups=sums, kept=partial(sums.kept, xp), **how)
            xhat, found = of.xhat, ()
            if keep:  # not the variance, beside which Triton 3.6 cannot place the mean
                found = (*sums.sums, *([of.spread.mean] if plan.centred else []))
        elif scaled:
            of = _scaled(compiler, plan, x, sums)
            xhat, found = of.xhat, tuple(sums.own(each) for each in of.spread if each is not None)
        else:
            pivot = sums.pivot(xp, x) if plan.centred else None
            d, left, var = kernels.shifted(xp, x, pivot, groups=sums, centred=plan.centred)
            rstd = kernels.inverse_root(xp, var + plan.eps, flat=1.0 if plan.tiny else None)
            d = d if left is None else d - sums.kept(xp, left)
            xhat = d * sums.kept(xp, rstd)
            # sums, not means: one more loop over the groups would keep those over x from becoming one
            found = tuple(sums.sums)
        return xp.astype(kernels.affine(xhat, gamma, beta), kind, copy=False), *found

    arrays: Arrays = [call.x, call.gamma, call.beta, *(call.spread or ())]
    form = _form(plan.view.shape, plan.view.axes, arrays)
    key = ("normalize", plan.eps, plan.centred, counted, scaled, widened and (keep,))
    place = None if call.out is None else compiler.place(plan.library, plan.enter(call.out), arrays)
    y, *found = _run(compiler, plan.library, form, inner, key, body, arrays, call.x.dtype, place)
    y = plan.leave(plan.library.xp.reshape(y, plan.view.shape)) if place is None else call.out
    if call.spread is not None:
        return y, call.spread
    xp = plan.library.xp
    found = [xp.reshape(each, plan.spread.shape) for each in found]
    if not found:
        return y, Spread(None, None, None)
    if scaled:
        return y, Spread(*found) if plan.centred else Spread(None, None, *found)
    if not plan.centred:
        return y, Spread(None, None, found[0] / plan.groups.divisor)
    if widened:
        sums, squares, mean = found
        var = (squares - sums * (1 / plan.groups.divisor) * sums) / plan.groups.divisor
        return y, Spread(mean, xp.zeros_like(mean), var)
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
    plan, compiler, given = call.plan, compiler_of(name), call.spread is not None
    widened = wide(call, name, dy)
    scaled = not given and not widened and safe(call, name, dy)
    inner, counted = name_of(plan.dtype), plan.groups.divisor != 1
    outer = None if dtype is None else name_of(dtype)
    pivoted = outer is not None and plan.centred and not (given or scaled or widened)

    def part(arrays: Sequence[Any], place: Array | None) -> list[Array]:
        form = _form(arrays[0].shape, plan.view.axes, arrays, shapes)
        roles = [None if shape is None else layouts.ones(form.of(shape)) for shape in shapes]

        def body(dy: Array, x: Array | None, gamma: Array | None, *parts: Array | None) -> Any:
            xp = compiler.xp
            sums: Any = Sums(form, compiler, dy, counted=counted)
            dy = xp.astype(dy, getattr(xp, inner), copy=False)
            x = None if x is None else xp.astype(x, getattr(xp, inner), copy=False)
            if scaled:
                of = _scaled(compiler, plan, x, sums)
            elif widened:
                spread = Spread(*parts)
                rstd = compiler.stored(kernels.inverse_root(xp, spread.var + plan.eps, flat=1.0))
                own = kernels.narrow(xp, spread, rstd, dy.dtype, kept=compiler.stored)
                of = Standardized(None if x is None else kernels.by(x, own), rstd, spread)
            else:
                mean, rest, rstd = (sums.given(xp, each) for each in parts)
                xhat = None if x is None else kernels.less(x, Spread(mean, rest, None)) * rstd
                of = Standardized(xhat, rstd, Spread(mean, rest, None))
            xhat, found, slope = of.xhat, [], None
            if outer is not None:
                if pivoted:
                    alone = kernels.alone(gamma, form.axes)
                    g = dy if alone else kernels.affine(dy, gamma, None)
                    g, left, _ = kernels.shifted(xp, g, sums.pivot(xp, g), groups=sums)
                    leaning = Spread(None, None, sums.mean_product(xp, g, of.xhat))
                    if (gamma is None or alone) and roles[:1] == [form.axes]:
                        slope = sums.sums[-1]  # the gradient of gamma: xhat has no mean that dy's could count with
                    dx = kernels.upright(g - sums.kept(xp, left), leaning, of)
                    dx = kernels.affine(dx, gamma if alone else None, None)
                elif widened:
                    how: dict[str, Any] = {"axes": form.axes, "centred": plan.centred, "kept": partial(sums.kept, xp)}
                    dx = kernels.input_gradient_wide(xp, dy, x, gamma, of, own, groups=sums, **how)
                else:
                    groups = None if given else sums
                    dx = kernels.input_gradient(xp, dy, gamma, of, groups=groups, centred=plan.centred)
                found.append(xp.astype(dx, getattr(xp, outer), copy=False))
                if pivoted:
                    found += sums.sums[1:3]
            for axes, factor, total in zip(roles, (xhat, None), (slope, None), strict=False):
                if axes is None:
                    continue
                if total is None:
                    product = kernels.affine(dy, factor, None) * 1.0
                    product = xp.astype(product, xp.float64) if widened else product
                    total = sums.total(xp, product, axes)
                found.append(xp.astype(total, getattr(xp, inner), copy=False))
            return tuple(found)

        key = ("gradients", outer, plan.eps, plan.centred, counted, scaled, widened, given, *roles)
        return _run(compiler, plan.library, form, inner, key, body, arrays, dtype, place)

    xp = plan.library.xp
    arrays = [dy, call.x, call.gamma]
    if widened:
        arrays += spread
    elif not scaled:  # a root for each number, and not for each group, is what a compiler would make of the variance
        with plan.library.quiet():
            flat = 1.0 if plan.tiny or given else None
            arrays += [spread.mean, spread.rest, kernels.inverse_root(xp, spread.var + plan.eps, flat=flat)]
    left = iter(_in_parts(plan, compiler, part, arrays, dtype, shapes) or part(arrays, None))
    dx = None if dtype is None else xp.reshape(next(left), plan.view.shape)
    if pivoted:
        with plan.library.quiet():
            sums, squares = next(left), next(left)
            if not (_fair(plan.library, sums, squares, plan.groups.divisor) and plan.library.most(squares) < math.inf):
                return None
    return dx, *(None if shape is None else xp.reshape(next(left), shape) for shape in shapes)


def _in_parts(
    plan: Plan,
    compiler: Compiler,
    part: Callable[[Arrays, Array | None], list[Array]],
    arrays: Arrays,
    dtype: Any,
    shapes: Sequence[tuple[int, ...] | None],
) -> list[Array] | None:
    """The gradients of a large array, some groups at a time: what the sums over rows leave for others to add is small.

    None where all groups go together, or nothing is summed over them.
    """
    (n, *rest), wanted = plan.view.shape, [shape for shape in shapes if shape is not None]
    step = PART // max(1, math.prod(rest))
    if not plan.library.readable(arrays[0]):  # a GPU adds in parts of its own
        return None
    if dtype is None or 0 in plan.view.axes or all(shape[0] > 1 for shape in wanted) or not 0 < step <= n // 4:
        return None
    dx = empty(plan.view.shape, arrays[0], dtype)
    if compiler.place(plan.library, dx, ()) is None:
        return None
    found: list[list[Array]] = []
    for i in range(0, n, step):
        these = [each if each is None or each.shape[0] == 1 else each[i : i + step, ...] for each in arrays]
        found.append(part(these, dx[i : i + step, ...])[1:])
    xp, joined = plan.library.xp, []
    of_groups = len(found[0]) - len(wanted)
    for every, shape in zip(zip(*found, strict=True), [(n,)] * of_groups + wanted, strict=True):
        # a part of one group has lost its first axis
        whole = xp.concat([xp.reshape(each, (-1, *shape[1:])) for each in every], axis=0)
        joined.append(kernels.total(xp, whole, axes=(0,), block=PARTS) if shape[0] == 1 else whole)
    return [dx, *joined]


def _scaled(compiler: Compiler, plan: Plan, x: Array, sums: Any) -> Standardized:
    finer, limits = compiler.library.subnormal, plan.limits
    subnormal = finer(x, limits.step * limits.further) if finer is not None and plan.tiny else None
    return kernels.standardize_scaled(
        compiler.xp, x, groups=sums, eps=plan.eps, centred=plan.centred, subnormal=subnormal
    )


def _form(
    shape: tuple[int, ...], axes: tuple[int, ...], arrays: Arrays, shapes: Sequence[tuple[int, ...] | None] = ()
) -> Form:
    """The form of a shape averaged over these axes, beside the other arrays, and summed to these shapes."""
    beside = tuple([tuple(each.shape) for each in arrays if each is not None])
    return joined(tuple(shape), axes, beside, tuple([each for each in shapes if each is not None]))


def _run(
    compiler: Compiler,
    library: Library,
    form: Form,
    inner: str,
    key: Hashable,
    body: Callable[..., Any],
    given: Arrays,
    dtype: Any,
    place: Array | None,
) -> list[Array]:
    """The results of the compiled body; the first, unless `dtype` is None, is of x's shape and goes to that place."""
    shape, own = form.view.shape, None
    with compiler.exact(inner), compiler.beside(library, given[0]):
        arrays = [None if each is None else compiler.enter(library, each, form.of(each.shape)) for each in given]
        # all that a version is good for, so that the compiler never makes a second one of its own accord
        kinds = [None if each is None else (each.dtype, each.shape[0] == 1, each.shape[1:]) for each in arrays]
        if place is None and dtype is not None:
            own = place = compiler.empty(library, shape, dtype, given[0])
        key = (compiler.name, inner, key, form.kind, *kinds, place is None, compiler.state(arrays[0]))
        function = _functions.get(key)
        if function is None:
            with _lock:
                if (function := _functions.get(key)) is None:
                    function = compiler.compile(body, rows=form.trailing, large=form.large)
                    _functions[key] = function
        place = None if place is None else compiler.enter(library, place, shape)
        found = [compiler.leave(library, each, given[0]) for each in function(arrays, place)]
        return found if own is None else [own, *found[1:]]


PART = 2**24
"""So many numbers of a large gradient are compiled for at a time."""
PARTS = 16
_functions: dict[Hashable, Callable[..., Any]] = {}
_lock = threading.RLock()
_FLOATS = ("bfloat16", "float16", "float32", "float64")
"""The dtypes of what is compiled, in the byte order of the machine."""
