"""The programs of a call: which calls they take, and what of the kernels they run."""

from typing import Any

from anynorm import kernels
from anynorm.arrays import empty, name_of
from anynorm.calls import Call, Plan
from anynorm.combinations import Wanted
from anynorm.executors.programs import compiled, cpu_run, cuda_run
from anynorm.executors.programs.cpu import Written
from anynorm.executors.programs.cuda_run import apart
from anynorm.executors.programs.trace import TracedSums
from anynorm.kernels import Array, Spread, Standardized
from anynorm.passes import ordinary
from anynorm.settings import current

SMALL = 2**20
"""A call of fewer bytes is no program, unless one is asked for."""
BRIEF = 2**13
"""The gradients of parameters of more numbers are added up by programs of their own."""
Forward = tuple[Array, Spread]
Gradients = tuple[Array | None, ...]


def supports(call: Call, *beside: Array) -> bool:
    """Whether a call, and what stands beside it, is run by programs."""
    plan = call.plan
    if plan.library.programs is not None:
        return current().engine != "arrays" and cuda_run.takes(call, [*_arrays(call), *beside])
    if plan.library.address is None or plan.library.traced():
        return False
    engine = current().engine
    if engine == "arrays" or (engine == "auto" and plan.nbytes < SMALL) or not plan.nbytes > 0 or not plan.view.axes:
        return False
    if compiled.state().version is None:
        if engine == "numba":
            raise ImportError(f"engine='numba' needs numba, which is {compiled.state().why}: pip install numba")
        return False
    if call.weights is not None or call.all_reduce is not None:
        return False
    readable, arrays = compiled.readable(), [*_arrays(call), *beside]
    return plan.library.plain(*arrays) and all(
        [plan.library.in_place(each) and name_of(each.dtype) in readable for each in arrays]  # noqa: C419
    )


def _arrays(call: Call) -> list[Array]:
    arrays = (call.x, call.gamma, call.beta, call.out, *(call.spread or ()))
    return [array for array in arrays if array is not None]


def forward(call: Call, *, keep: bool) -> Forward | None:
    """The result of a call, in `out` where there is one; and its statistics, if they are to be kept."""
    plan, out, xp = call.plan, call.out, call.plan.library.xp
    if plan.library.programs is not None:
        with plan.library.programs.on(call.x):
            return cuda_run.normalize(call, keep=keep)
    twice, given, in_place, place = _twice(plan), call.spread, None, None
    if out is not None and apart(call, out):
        place = plan.enter(out)
        in_place = 0 if plan.library.overlap(call.x, out) else None
    if twice and given is None and out is not None:  # nothing is written before they are known to be in range
        given = statistics(call)
        if given is None:
            return None
        call = call._replace(spread=given)
        y = forward(call, keep=keep)
        return None if y is None else (y[0], given)
    y = empty(plan.view.shape, call.x, call.x.dtype) if place is None else place

    def body(words: Any, numbers: list[Any], sums: TracedSums) -> Written:
        x, gamma, beta, *known = numbers
        spread = Spread(*known) if known else _statistics(plan, words, x, sums)
        of = kernels.standardize_with(words, x, spread, eps=sums.tracer.eps)
        parts = () if known else _kept(plan, spread)
        return Written([kernels.affine(of.xhat, gamma, beta)], parts)

    inputs = [call.x, call.gamma, call.beta, *(given or ())]
    number = 0 if given is not None else (2 + twice if plan.centred else 1)
    found, _ = cpu_run.run(
        *(plan, "forward", inputs, [y], [], body), of_groups=number, keep=keep or twice, in_place=in_place
    )
    spread = given or _spread(plan, found)
    if twice and given is None and not ordinary(plan, spread.var):
        return None
    if out is None:
        return plan.leave(y), spread
    if place is None:
        out[...] = plan.leave(y)
    return out, spread


def statistics(call: Call) -> Spread | None:
    """The statistics of a call."""
    plan = call.plan
    if plan.library.programs is not None:
        with plan.library.programs.on(call.x):
            return cuda_run.survey(call)

    def body(words: Any, numbers: list[Any], sums: TracedSums) -> Written:
        spread = _statistics(plan, words, numbers[0], sums)
        return Written(of_groups=_kept(plan, spread))

    number = 2 + _twice(plan) if plan.centred else 1
    found, _ = cpu_run.run(plan, "statistics", [call.x], [], [], body, of_groups=number)
    spread = _spread(plan, found)
    return None if _twice(plan) and not ordinary(plan, spread.var) else spread


def backward(call: Call, dy: Array, wanted: Wanted, spread: Spread) -> Gradients | None:
    """The gradients of a call with respect to x and its parameters, beside the view; None where they are not wanted."""
    plan, given, xp = call.plan, call.spread is not None, call.plan.library.xp
    if plan.library.programs is not None:
        with plan.library.programs.on(dy):
            return cuda_run.gradients(call, dy, wanted, spread)
    twice = _twice(plan)
    if twice and not given and not ordinary(plan, spread.var):
        return None
    of_x = wanted.dtype is not None
    exact = not twice and spread.mean is not None and spread.mean.dtype != plan.dtype  # the mean has all digits
    rest = None if exact else spread.rest
    sizes = [None if shape is None else _size(shape) for shape in wanted.parameters]
    fused = [i for i, size in enumerate(sizes) if size is not None and size <= BRIEF]

    def body_of(of_x: bool, these: list[int], *, totals: bool = False, numbers: bool = False) -> cpu_run.Body:
        def body(words: Any, arrays: list[Any], sums: TracedSums) -> Written:
            dy, x, gamma, mean, rest, var = arrays
            rstd = None if var is None else kernels.inverse_root(words, var + sums.tracer.eps, flat=1.0)
            own = Spread(mean, rest, var)
            of = Standardized(None if x is None else kernels.less(x, own) * rstd, rstd, own)
            dx = []
            if of_x and given:
                dx = [kernels.input_gradient(words, dy, gamma, of, groups=None, centred=plan.centred)]
            elif of_x:
                how: dict[str, Any] = {"groups": sums, "centred": plan.centred, "twice": twice}
                dx = [kernels.wide_input_gradient(words, dy, gamma, of, **how)]
            products = [kernels.affine(dy, None if i else of.xhat, None) for i in these]
            if totals:
                return Written(of_groups=[words.sum(each, axis=sums.axes, keepdims=True) for each in products])
            return Written(products) if numbers else Written(dx, (), products)

        return body

    def inputs(of_x: bool, these: list[int]) -> list[Array | None]:
        reads_x = 0 in these or (of_x and not given)
        known = (spread.mean, rest, spread.var) if of_x or reads_x else (None,) * 3
        return [dy, call.x if reads_x else None, call.gamma if of_x else None, *known]

    found: list[Array | None] = [None for _ in wanted.parameters]
    dx = empty(plan.view.shape, dy, wanted.dtype) if of_x else None
    if of_x or fused:
        shapes = [shape for i, shape in enumerate(wanted.parameters) if shape is not None and i in fused]
        what = ("backward", given, of_x, *fused)
        results = [] if dx is None else [dx]
        _, sums = cpu_run.run(plan, what, inputs(of_x, fused), results, shapes, body_of(of_x, fused))
        for i, each in zip(fused, sums, strict=True):
            found[i] = xp.astype(each, plan.dtype, copy=False)
    for i, shape in enumerate(wanted.parameters):
        if shape is None or i in fused:
            continue
        what, axes = ("backward", "parameter", i), tuple(a for a, n in enumerate(shape) if n == 1 < plan.view.shape[a])
        if axes:
            body = body_of(False, [i], totals=True)
            how: dict[str, Any] = {"axes": axes, "of_groups": 1, "dtype": plan.dtype}
            (found[i],), _ = cpu_run.run(plan, what, inputs(False, [i]), [], [], body, **how)
        else:
            found[i] = empty(plan.view.shape, dy, plan.dtype)
            body = body_of(False, [i], numbers=True)
            cpu_run.run(plan, (*what, "numbers"), inputs(False, [i]), [found[i]], [], body)
    return dx, *found


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _twice(plan: Plan) -> bool:
    """Whether numbers are as wide as the sums of programs."""
    return name_of(plan.dtype) == "float64"


def _statistics(plan: Plan, words: Any, x: Any, sums: TracedSums) -> Spread:
    return kernels.wide_statistics(words, x, groups=sums, centred=plan.centred, twice=_twice(plan))


def _kept(plan: Plan, spread: Spread) -> list[Any]:
    """What is kept of statistics; the mean of narrower numbers has no rest."""
    parts = (spread.mean, spread.rest if _twice(plan) else None, spread.var)
    return [each for each in parts if each is not None]


def _spread(plan: Plan, found: list[Array]) -> Spread:
    """Statistics of what was kept."""
    if not found:
        return Spread(None, None, None)
    if not plan.centred:
        return Spread(None, None, *found)
    if len(found) == 3:
        return Spread(*found)
    mean, var = found
    xp = plan.library.xp
    return Spread(mean, xp.broadcast_to(xp.zeros((1,) * mean.ndim, dtype=mean.dtype), mean.shape), var)
