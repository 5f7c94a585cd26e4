"""The programs of a call: which calls they take, and what of the kernels they run."""

from typing import Any, NamedTuple

from anynorm import kernels
from anynorm import weights as weighting
from anynorm.arrays import empty, name_of
from anynorm.calls import Call, Plan, Wanted
from anynorm.executors.programs import compiled, cpu_run, cuda_run
from anynorm.executors.programs.cpu import Written
from anynorm.executors.programs.cuda_run import apart
from anynorm.executors.programs.trace import TracedSums, TracedWeightedSums
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
    if call.all_reduce is not None:
        return False
    readable, arrays = compiled.readable(), [*_arrays(call), *beside]
    return plan.library.plain(*arrays) and all(
        [plan.library.in_place(each) and name_of(each.dtype) in readable for each in arrays]  # noqa: C419
    )


def _arrays(call: Call) -> list[Array]:
    arrays = (call.x, call.gamma, call.beta, call.out, _weights(call), *(call.spread or ()))
    return [array for array in arrays if array is not None]


def forward(call: Call, *, keep: bool) -> Forward | None:
    """The result of a call, in `out` where there is one; and its statistics, if they are to be kept."""
    plan, out, xp = call.plan, call.out, call.plan.library.xp
    if plan.library.programs is not None:
        with plan.library.programs.on(call.x):
            return cuda_run.normalize(call, keep=keep)
    careful, in_place, place = _careful(call), None, None
    if out is not None and apart(call, out):
        place = plan.enter(out)
        in_place = 0 if plan.library.overlap(call.x, out) else None
    known: list[Array | None] = [*(call.spread or ())]
    if careful and out is not None and not known:  # nothing is written before they are known to be in range
        found = _found(call)
        if found is None:
            return None
        known = [found.mean, found.rest, found.var, found.weight]
    y = empty(plan.view.shape, call.x, call.x.dtype) if place is None else place

    def body(words: Any, numbers: list[Any], sums: TracedSums) -> Written:
        x, gamma, beta, weights, *known = numbers
        if known:
            found = _Found(*known)
        else:
            found = _statistics(call, words, x, weights, sums)
        of = kernels.standardize_with(words, x, Spread(*found[:3]), eps=sums.tracer.eps)
        xhat = of.xhat
        if found.weight is not None:  # a group without weight is all beta
            xhat = words.where(found.weight > 0, xhat, words.zeros_like(xhat))
        return Written([kernels.affine(xhat, gamma, beta)], [] if known else _kept(plan, found))

    inputs = [call.x, call.gamma, call.beta, None if known else _weights(call), *known]
    made, _ = cpu_run.run(
        *(plan, ("forward", careful), inputs, [y], [], body),
        of_groups=0 if known else _number(call),
        keep=keep or careful,
        in_place=in_place,
    )
    spread = call.spread or Spread(*_restored(plan, _Found(*known) if known else _given_back(call, made))[:3])
    if careful and not known and not _in_range(call, _given_back(call, made)):
        return None
    if out is None:
        return plan.leave(y), spread
    if place is None:
        out[...] = plan.leave(y)
    return out, spread


class _Found(NamedTuple):
    """The statistics of each group, of arrays or of numbers of a program."""

    mean: Any = None
    rest: Any = None
    """None where the mean has all digits."""
    var: Any = None
    weight: Any = None
    """The sum of the weights, where there are any."""


def statistics(call: Call) -> Spread | None:
    """The statistics of a call."""
    plan = call.plan
    if plan.library.programs is not None:
        with plan.library.programs.on(call.x):
            return cuda_run.survey(call)
    found = _found(call)
    return None if found is None else Spread(*_restored(plan, found)[:3])


def _found(call: Call) -> _Found | None:
    plan = call.plan

    def body(words: Any, numbers: list[Any], sums: TracedSums) -> Written:
        return Written(of_groups=_kept(plan, _statistics(call, words, *numbers, sums)))

    inputs = [call.x, _weights(call)]
    made, _ = cpu_run.run(plan, ("statistics", _careful(call)), inputs, [], [], body, of_groups=_number(call))
    found = _given_back(call, made)
    return found if _in_range(call, found) else None


def backward(call: Call, dy: Array, wanted: Wanted, spread: Spread) -> Gradients | None:
    """The gradients of a call with respect to x and its parameters, beside the view; None where they are not wanted."""
    plan, given, xp = call.plan, call.spread is not None, call.plan.library.xp
    if plan.library.programs is not None:
        with plan.library.programs.on(dy):
            return cuda_run.gradients(call, dy, wanted, spread)
    twice, weights = _twice(plan), _weights(call)
    if twice and not given and not ordinary(plan, spread.var):
        return None
    weight = None
    if weights is not None:
        found_weight = _sum_of_weights(call)
        if found_weight is None:
            return None
        weight = found_weight
    of_x = wanted.dtype is not None
    exact = not twice and spread.mean is not None and spread.mean.dtype != plan.dtype  # the mean has all digits
    rest = None if exact else spread.rest
    sizes = [None if shape is None else _size(shape) for shape in wanted.parameters]
    fused = [i for i, size in enumerate(sizes) if size is not None and size <= BRIEF]

    def body_of(of_x: bool, these: list[int], *, totals: bool = False, numbers: bool = False) -> cpu_run.Body:
        def body(words: Any, arrays: list[Any], sums: TracedSums) -> Written:
            dy, x, gamma, mean, rest, var, each, weight = arrays
            rstd = None if var is None else kernels.inverse_root(words, var + sums.tracer.eps, flat=1.0)
            own = Spread(mean, rest, var)
            xhat = None if x is None else kernels.less(x, own) * rstd
            if each is not None and xhat is not None:
                dy, xhat = _without_strays(words, dy, xhat, each, weight)
            of = Standardized(xhat, rstd, own)
            dx, how = [], {"groups": sums, "centred": plan.centred, "twice": twice}
            if of_x and given:
                dx = [kernels.input_gradient(words, dy, gamma, of, groups=None, centred=plan.centred)]
            elif of_x and each is not None:
                of_present = words.where(weight > 0, dy, words.zeros_like(dy))
                dx = [weighting.wide_input_gradient(words, of_present, gamma, of, each, weight, **how)]
            elif of_x:
                dx = [kernels.wide_input_gradient(words, dy, gamma, of, **how)]
            products = [kernels.affine(dy, None if i else of.xhat, None) for i in these]
            if totals:
                return Written(of_groups=[words.sum(each, axis=sums.axes, keepdims=True) for each in products])
            return Written(products) if numbers else Written(dx, (), products)

        return body

    def inputs(of_x: bool, these: list[int]) -> list[Array | None]:
        reads_x = 0 in these or (of_x and not given) or weights is not None  # to know what weighs nothing and is no number
        known = (spread.mean, rest, spread.var) if of_x or reads_x else (None,) * 3
        return [dy, call.x if reads_x else None, call.gamma if of_x else None, *known, weights, weight]

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


def _weights(call: Call) -> Array | None:
    """The weights of a call, which make no difference to statistics that are given."""
    return None if call.weights is None or call.spread is not None else call.weights.each


def _careful(call: Call) -> bool:
    """Whether sums may leave the range of float64, and numbers need a second pass for their last digits."""
    weights = _weights(call)
    return _twice(call.plan) or (weights is not None and name_of(weights.dtype) != "bool")


def _statistics(call: Call, words: Any, x: Any, weights: Any, sums: TracedSums) -> _Found:
    plan, twice = call.plan, _careful(call)
    if weights is None:
        return _Found(*kernels.wide_statistics(words, x, groups=sums, centred=plan.centred, twice=twice))
    groups = TracedWeightedSums(sums.tracer, weights)
    spread = weighting.wide_statistics(words, x, weights, groups=groups, centred=plan.centred, twice=twice)
    return _Found(*spread, groups.sum_of_weights)


def _without_strays(words: Any, dy: Any, xhat: Any, each: Any, weight: Any) -> tuple[Any, Any]:
    """dy and xhat as nothing where xhat weighs nothing and is not finite; and xhat in a group without weight."""
    nothing, present = words.zeros_like(xhat), weight > 0
    fine = (each > 0) | words.isfinite(xhat)
    return words.where(fine | ~present, dy, nothing), words.where(fine & present, xhat, nothing)


def _sum_of_weights(call: Call) -> Array | None:
    """That of each group; None where it is out of range."""
    plan = call.plan

    def body(words: Any, numbers: list[Any], sums: TracedSums) -> Written:
        return Written(of_groups=[words.sum(numbers[1], axis=sums.axes, keepdims=True)])

    ((weight,), _) = cpu_run.run(plan, "weight", [call.x, _weights(call)], [], [], body, of_groups=1)
    return weight if _in_range(call, _Found(var=weight * 0, weight=weight)) else None


def _number(call: Call) -> int:
    """How many arrays of statistics are kept."""
    plan = call.plan
    return (plan.centred + (plan.centred and _twice(plan)) + 1) + (_weights(call) is not None)


def _kept(plan: Plan, found: _Found) -> list[Any]:
    """What is kept of statistics; the mean of narrower numbers has no rest."""
    parts = (found.mean, found.rest if _twice(plan) else None, found.var, found.weight)
    return [each for each in parts if each is not None]


def _given_back(call: Call, made: list[Array]) -> _Found:
    """Statistics of the arrays that were kept."""
    if not made:
        return _Found()
    *parts, weight = made if _weights(call) is not None else (*made, None)
    if not call.plan.centred:
        return _Found(None, None, *parts, weight)
    mean, *rest, var = parts
    return _Found(mean, *(rest or [None]), var, weight)


def _restored(plan: Plan, found: _Found) -> _Found:
    """With a rest of 0 where the mean has all digits."""
    if found.mean is None or found.rest is not None:
        return found
    xp, mean = plan.library.xp, found.mean
    return found._replace(rest=xp.broadcast_to(xp.zeros((1,) * mean.ndim, dtype=mean.dtype), mean.shape))


def _in_range(call: Call, found: _Found) -> bool:
    """Whether no sum overflowed, and none that matters underflowed."""
    plan, xp = call.plan, call.plan.library.xp
    if _twice(plan) and not ordinary(plan, found.var):
        return False
    if not _careful(call) or found.weight is None:
        return True
    weight = found.weight
    return bool(xp.all((weight == 0) | ((weight > LEAST) & (weight < MOST))))


LEAST, MOST = 1e-100, 1e200
"""Between these sums of weights leave room for their products with squares."""
