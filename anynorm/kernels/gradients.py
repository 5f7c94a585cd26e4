"""The gradients of x, gamma and beta."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from anynorm.kernels.ops import NEW, PURE, Array, Namespace, Ops, Outputs
from anynorm.kernels.reductions import Reduction, Sums, WideReduction
from anynorm.kernels.scaling import scaled
from anynorm.kernels.standardizing import Standardizer, affine, subtract_mean
from anynorm.kernels.statistics import Standardized
from anynorm.kernels.weighting import positive


class GradientSums(NamedTuple):
    """What g, the gradient of xhat, adds up to over all or some of the numbers of each group, whose weights are w."""

    mean: Array | None
    """The `anchor` of g; None for 0."""
    rest: Array | None
    """sum(g - w * mean); None where x was not centred."""
    product: Array | None
    """sum((g - w * mean) * xhat); a g that is nearly all mean would lose in g * xhat what else it has to say. None
    where x was divided by nothing."""
    weight: Any
    """sum(w)."""
    level: Array | None = None
    """sum(w * xhat) / sum(w) of a part of a group; over all of it that is 0."""


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
    groups: Reduction | None,
    centred: bool,
    last: bool,
    places: Outputs = NEW,
    power: Array | None = None,
    exact: bool = False,
) -> Array:
    """The gradient of `affine(standardize(x))` with respect to x; without `groups`, of `standardize_with`.

    rstd * (g - p * sum(g) - p * xhat * sum(g * xhat)), where g = dy * gamma, and p is the share of a number in its
    group; sum(g) stays where x was not centred.
    Where x was divided by nothing there is no rstd and no xhat, and it is g - p * sum(g).
    A gamma that is `last` is one number for each group. Where it varies, a `power` of two near rstd goes to g first: so
    g has all its digits if the gradient has.
    """
    if groups is None:
        if of.rstd is None:
            return places.result.multiply(dy, 1.0)  # never the caller's own array
        return scaled(xp, dy, gamma, of.rstd, places=places, exact=exact)
    g = dy if last else cotangent(xp, dy, gamma, power, places=places, exact=exact)
    g, sums = gradient_sums(xp, g, of.xhat, groups=groups, centred=centred, places=places)
    gamma = gamma if last else None
    return input_gradient_by_sums(xp, g, sums, of, gamma, power, each=groups.each, places=places, exact=exact)


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
    g, wide = affine(dy, gamma, None), of.rstd.dtype
    xhat = subtract_mean(xp.astype(x, wide), of.stats) * of.rstd
    _, sums = gradient_sums(xp, xp.astype(g, wide), xhat, groups=groups, centred=centred)
    if centred:
        whole = sums.mean + sums.rest / sums.weight
        mean = xp.astype(whole, g.dtype)
        g = g - mean - xp.astype(whole - xp.astype(mean, wide), g.dtype)
    sums = GradientSums(None, None, xp.astype(sums.product / sums.weight, g.dtype), 1.0)
    return input_gradient_by_sums(xp, g, sums, of._replace(rstd=own.rstd), None, None) * own.unit


def one_per_group(gamma: Array | None, axes: tuple[int, ...]) -> bool:
    """Whether gamma is one number for each group: a dy that is nearly all mean loses that before gamma rounds it."""
    return gamma is not None and all([gamma.shape[axis] == 1 for axis in axes])  # noqa: C419 - Dynamo takes no generator


def gradient_sums(
    xp: Namespace,
    g: Array,
    xhat: Array | None,
    *,
    groups: Reduction,
    centred: bool,
    part: bool = False,
    places: Outputs = NEW,
) -> tuple[Array, GradientSums]:
    """g less w times its anchor if x was `centred`, and what it adds up to over each group, or over a part of it."""
    mean = rest = level = None
    if centred:
        mean = groups.anchor(xp, g)
        g = less_anchor(g, mean, groups.each, ops=places.result)
        rest, level = groups.total(xp, g), groups.mean(xp, xhat) if part and xhat is not None else None
    product = None if xhat is None else groups.total_product(xp, g, xhat, ops=places.product)
    return g, GradientSums(mean, rest, product, groups.weight, level)


def merge_gradient_sums(xp: Namespace, parts: list[GradientSums]) -> GradientSums:
    """What g adds up to over parts of the groups, together."""
    weight = sum(part.weight for part in parts)
    products, level = [part.product for part in parts if part.product is not None], None
    product = sum(products) if products else None
    if parts[0].rest is None:
        return GradientSums(None, None, product, weight)
    shares = [part.weight / positive(xp, weight) for part in parts]
    mean = sum(share * part.mean for share, part in zip(shares, parts, strict=True))
    moved = [part.weight * (part.mean - mean) for part in parts]
    rest = sum(step + part.rest for step, part in zip(moved, parts, strict=True))
    if product is not None:
        level = sum(share * part.level for share, part in zip(shares, parts, strict=True))
        product = product + sum(step * part.level for step, part in zip(moved, parts, strict=True))
    return GradientSums(mean, rest, product, weight, level)


def less_anchor(g: Array, mean: Array | None, each: Array | None, *, ops: Ops = PURE) -> Array:
    """g less w times its anchor."""
    return g if mean is None else ops.subtract(g, mean if each is None else each * mean)


def input_gradient_of_part(
    xp: Namespace,
    g: Array,
    sums: GradientSums,
    of: Standardized,
    each: Array | None,
    gamma: Array | None,
    power: Array | None,
    *,
    places: Outputs = NEW,
    exact: bool = False,
) -> Array:
    """The gradient of some numbers of each group, for what g adds up to over all of them."""
    g = less_anchor(g, sums.mean, each, ops=places.result)
    return input_gradient_by_sums(xp, g, sums, of, gamma, power, each=each, places=places, exact=exact)


def input_gradient_by_sums(
    xp: Namespace,
    g: Array,
    sums: GradientSums,
    of: Standardized,
    gamma: Array | None,
    power: Array | None,
    *,
    each: Array | None = None,
    places: Outputs = NEW,
    exact: bool = False,
) -> Array:
    """rstd * (g - p * sum(g) - p * xhat * sum(g * xhat)), for a g `less_anchor`, which has the `power`; p = w / W.

    `each` is w, and 0 a gradient without any W. A gamma that is one number for each group comes last.
    """
    ops, weight, product = places.result, positive(xp, sums.weight), sums.product
    if sums.rest is not None:
        product = product if sums.level is None else product - sums.rest * sums.level
        rest = sums.rest / weight
        g = ops.subtract(g, rest if each is None else each * rest)
    if product is not None:  # xhat times its weight first: it may be far out without any
        xhat = of.xhat if each is None else places.xhat.multiply(of.xhat, each)
        g = ops.subtract(g, places.xhat.multiply(xhat, product / weight))
    if each is not None:
        g = xp.where(sums.weight > 0, g, xp.zeros_like(g))
    if of.rstd is None:
        return g
    rstd = of.rstd if power is None else of.rstd / power
    return scaled(xp, g, gamma, rstd, places=places._replace(product=PURE), exact=exact)


def parameter_gradients(
    xp: Namespace,
    dy: Array,
    xhat: Array,
    shapes: Sequence[tuple[int, ...] | None],
    *,
    block: float | None,
    ones: Array | None = None,
    ops: Ops = PURE,
) -> list[Array | None]:
    """The gradients of gamma, or of gamma and beta, of these shapes; None for None.

    They are the sums of dy * xhat and of dy over the axes that the parameter was broadcast along.
    """
    found: list[Array | None] = []
    for shape, factor in zip(shapes, (xhat, None), strict=False):
        if shape is None:
            found.append(None)
            continue
        groups = Sums(tuple(axis for axis, n in enumerate(shape) if n == 1), 1.0, block, ones)
        if not groups.axes:
            found.append(dy * (1.0 if factor is None else factor))  # never the caller's own array
        else:
            found.append(groups.mean(xp, dy) if factor is None else groups.mean_product(xp, dy, factor, ops=ops))
    return found
