"""The gradients of x, gamma and beta."""

from anynorm.kernels.ops import NEW, PURE, Array, Namespace, Ops, Outputs
from anynorm.kernels.reductions import Sums, WideReduction
from anynorm.kernels.scaling import power_of_two, scaled
from anynorm.kernels.standardizing import Standardizer, affine, subtract_mean
from anynorm.kernels.statistics import Standardized, Stats, centre


def cotangent(
    xp: Namespace,
    dy: Array,
    gamma: Array | None,
    power: Array | None,
    *,
    places: Outputs = NEW,
    exact: bool = False,
) -> Array:
    """The gradient of xhat, for a gamma that varies within the groups; times a power of two, if there is one."""
    if power is None or gamma is None:
        return affine(dy, gamma, None, ops=places.result)
    return scaled(xp, dy, gamma, power, places=places, exact=exact)


def input_gradient(
    xp: Namespace,
    dy: Array,
    gamma: Array | None,
    of: Standardized,
    *,
    groups: Sums | None,
    centred: bool,
    places: Outputs = NEW,
    power: Array | None = None,
    exact: bool = False,
) -> Array:
    """The gradient of `affine(standardize(x))` with respect to x; without `groups`, of `standardize_with`.

    rstd * (g - mean(g) - xhat * mean(g * xhat)), where g = dy * gamma; the mean of g stays where x was not centred.
    A `power` of two near rstd goes to g first, where gamma varies: so g has all its digits if the gradient has.
    """
    if groups is None:
        return scaled(xp, dy, gamma, of.rstd, places=places, exact=exact)
    last = gamma if one_per_group(gamma, groups.axes) else None
    g = dy if last is not None else cotangent(xp, dy, gamma, power, places=places, exact=exact)
    g, sums_of_g = gradient_sums(xp, g, of.xhat, groups=groups, centred=centred, places=places)
    return input_gradient_by_sums(xp, g, sums_of_g, of, last, power, places=places, exact=exact)


def input_gradient_wide(
    xp: Namespace,
    dy: Array,
    x: Array,
    gamma: Array | None,
    of: Standardized,
    own: Standardizer,
    *,
    groups: WideReduction,
    centred: bool,
) -> Array:
    """`input_gradient` by sums in the wide dtype of the statistics, of numbers of any size."""
    if one_per_group(gamma, groups.axes):
        return input_gradient_wide(xp, dy, x, None, of, own, groups=groups, centred=centred) * gamma
    g, dtype, pivot = affine(dy, gamma, None), of.rstd.dtype, None
    wide = xp.astype(g, dtype)
    if centred and gamma is None:  # where all are the same nothing is left
        pivot = groups.first(wide)
        wide = wide - pivot
    slope = groups.mean_product(xp, wide, subtract_mean(xp.astype(x, dtype), of.stats) * of.rstd)
    if centred:
        whole = groups.mean(xp, wide) if pivot is None else groups.mean(xp, wide) + pivot
        mean = xp.astype(whole, g.dtype)
        g = g - mean - xp.astype(whole - xp.astype(mean, dtype), g.dtype)
    return (g - of.xhat * xp.astype(slope, g.dtype)) * own.rstd * own.unit


def wide_input_gradient(
    xp: Namespace,
    dy: Array,
    gamma: Array | None,
    of: Standardized,
    *,
    groups: WideReduction,
    centred: bool,
    twice: bool = False,
) -> Array:
    """`input_gradient` of numbers in a wide dtype, for statistics of `wide_statistics`, in as many passes."""
    last = gamma if one_per_group(gamma, groups.axes) else None
    power = power_of_two(xp, of.rstd) if twice and gamma is not None and last is None else None
    g = dy if last is not None else cotangent(xp, dy, gamma, power)
    if not centred:
        sums_of_g = Stats(None, None, groups.mean_product(xp, g, of.xhat))
        return input_gradient_by_sums(xp, g, sums_of_g, of, last, power)
    pivot = groups.first(g)
    d = g - pivot
    mean, slope = pivot + groups.mean(xp, d), groups.mean_product(xp, d, of.xhat)
    d = g - mean
    if twice:
        rest, slope = groups.mean(xp, d), groups.mean_product(xp, d, of.xhat)
        d = d - rest
    return input_gradient_by_sums(xp, d, Stats(mean, None, slope), of, last, power)


def one_per_group(gamma: Array | None, axes: tuple[int, ...]) -> bool:
    """Whether gamma is one number for each group: a dy that is nearly all mean loses that before gamma rounds it."""
    return gamma is not None and all([gamma.shape[axis] == 1 for axis in axes])  # noqa: C419 - Dynamo takes no generator


def gradient_sums(
    xp: Namespace, g: Array, xhat: Array, *, groups: Sums, centred: bool, places: Outputs = NEW
) -> tuple[Array, Stats]:
    """g less its mean if x was `centred`, and its statistics; beside the mean not its variance, but mean(g * xhat)."""
    mean = rest = None
    if centred:
        g, mean, rest = centre(xp, g, groups=groups, ops=places.result)
    return g, Stats(mean, rest, groups.mean_product(xp, g, xhat, ops=places.product))


def input_gradient_by_sums(
    xp: Namespace,
    g: Array,
    sums_of_g: Stats,
    of: Standardized,
    gamma: Array | None,
    power: Array | None,
    *,
    places: Outputs = NEW,
    exact: bool = False,
) -> Array:
    """rstd * (g - xhat * mean(g * xhat)), for a g whose mean was taken away, and which has the `power`.

    A gamma that is one number for each group comes last.
    """
    g = places.result.subtract(g, places.xhat.multiply(of.xhat, sums_of_g.var))
    rstd = of.rstd if power is None else of.rstd / power
    return scaled(xp, g, gamma, rstd, places=places._replace(product=PURE), exact=exact)


def parameter_gradient(
    xp: Namespace,
    dy: Array,
    factor: Array | None,
    shape: tuple[int, ...],
    *,
    block: int | None,
    ones: Array | None = None,
    ops: Ops = PURE,
) -> Array:
    """The gradient of a parameter of this shape: the sum of dy * factor over the axes that it was broadcast along."""
    groups = Sums(tuple(axis for axis, n in enumerate(shape) if n == 1), 1.0, block, ones)
    if not groups.axes:
        return dy * (1.0 if factor is None else factor)  # never the caller's own array
    return groups.mean(xp, dy) if factor is None else groups.mean_product(xp, dy, factor, ops=ops)
