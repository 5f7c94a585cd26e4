"""The norms of frameworks' checkpoints: what their numbers mean here, and what is written for them."""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from anynorm.arrays.checks import check_bool, check_real, compute_dtype
from anynorm.arrays.counts import is_number
from anynorm.arrays.library import Library
from anynorm.arrays.recognize import library_of, one_library
from anynorm.dialects import AFFINE, Dialect, Entries, Spelling, check_name, dialect_of, levels, norm_of
from anynorm.keywords import checks_names
from anynorm.state import RunningStats
from anynorm.statistics import describe
from anynorm.weight import WeightNorm

ArrayT = TypeVar("ArrayT")


class _Source(NamedTuple):
    """What the fields of `NormParams` were made of."""

    dialect: str
    spelling: Spelling
    zero_centred: bool
    fields: dict[str, Any]
    entries: dict[str, Any]


@checks_names
@dataclass(frozen=True, eq=False, repr=False)
class NormParams(Generic[ArrayT]):
    """The numbers of a norm out of a checkpoint, by this library's conventions; None for what the norm has not.

    Parameters
    ----------
    gamma, beta : array, optional
        Scale and shift, what a norm multiplies with and adds.
    running : RunningStats, optional
        Of a batch norm.
    weight : WeightNorm, optional
        Of weight normalization.
    eps : float, optional
        What the norm adds to a variance.
    zero_centred : bool
        Whether the checkpoint holds gamma - 1.
    source : optional
        What `from_checkpoint` read: `to_checkpoint` writes each array back as it was whose field here is still the
        object that was made of it.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, or arrays come from two libraries.

    Notes
    -----
    Frozen; ``dataclasses.replace(params, gamma=...)`` makes another.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> params = anynorm.NormParams(np.ones(3), np.zeros(3))
    >>> anynorm.to_checkpoint(params, "norm1", dialect="torch")
    {'norm1.weight': array([1., 1., 1.]), 'norm1.bias': array([0., 0., 0.])}
    """

    gamma: ArrayT | None = None
    beta: ArrayT | None = None
    running: Any = None  # not `RunningStats | None`, so that what is known to be there is passed on as it is
    weight: Any = None
    eps: Any = 1e-5
    _: KW_ONLY
    zero_centred: bool = False
    source: Any = None

    def __post_init__(self) -> None:
        for name, kind in (("running", RunningStats), ("weight", WeightNorm)):
            value = getattr(self, name)
            if not isinstance(value, (kind, type(None))):
                raise TypeError(f"{name} must be {kind.__name__} or None, got {type(value).__name__}")
        arrays: dict[str, Any] = {"gamma": self.gamma, "beta": self.beta}
        arrays |= {"running.mean": self.running and self.running.mean, "weight.v": self.weight and self.weight.v}
        found = {name: x for name, x in arrays.items() if x is not None}
        if found:
            library = one_library(**found)
            for name, x in found.items():
                compute_dtype(library, name, x)
        if self.eps is not None:
            check_real("eps", self.eps, least=0)
        check_bool("zero_centred", self.zero_centred)

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in ("gamma", "beta", "running", "weight", "eps")}
        shown = {name: describe(x) if hasattr(x, "shape") else x for name, x in values.items() if x is not None}
        shown |= {"zero_centred": True} if self.zero_centred else {}
        return f"NormParams({', '.join(f'{name}={value}' for name, value in shown.items())})"


@checks_names
def from_checkpoint(
    state: Mapping[Any, Any],
    name: str = "",
    *,
    dialect: str,
    zero_centred: bool = False,
    eps: float | None = None,
    momentum: float | None = None,
) -> NormParams[Any]:
    """One norm out of a framework's checkpoint.

    Parameters
    ----------
    state : mapping of names to arrays
        What the framework, safetensors or `numpy.load` gives; no framework is imported. Mappings in mappings, or flat
        names with ``.`` or ``/`` between their parts, with or without the framework's outer keys.
    name : str
        The norm's, with ``.`` or ``/``; it may be left out where there is but one.
    dialect : str
        ``"torch"``, ``"keras"``, ``"flax"`` (Linen), ``"nnx"``, ``"equinox"``, ``"haiku"``, ``"mlx"`` or ``"onnx"``.
    zero_centred : bool
        Whether the model multiplies with 1 + w, w being what is stored. No checkpoint says so.
    eps, momentum : float, optional
        What the model was given, momentum as the weight of the old value. No checkpoint says these either: by default
        they are the framework's defaults.

    Returns
    -------
    NormParams
        The arrays are those of `state` where a convention is the same. 1 + w is computed, and returned, in float32 for
        2-byte floats.

    Raises
    ------
    TypeError
        If `state` is not a mapping, or what is needed of it is not a real floating array.
    ValueError
        If there is no such norm, or more than one that could be meant; the message lists what there is.

    References
    ----------
    The table in the documentation, which is made of the table in this module, says what each framework keeps.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> ones = np.ones(3)
    >>> state = {"bn1.weight": ones, "bn1.bias": ones, "bn1.running_mean": ones, "bn1.running_var": ones}
    >>> params = anynorm.from_checkpoint(state, "bn1", dialect="torch")
    >>> params.running.momentum, params.running.correction  # PyTorch's 0.1, and its unbiased variance
    (0.9, 1)
    >>> anynorm.batch_norm(np.ones((1, 3)), params.gamma, params.beta, moments=params.running, eps=params.eps)
    array([[1., 1., 1.]])
    """
    form = dialect_of(dialect)
    check_bool("zero_centred", zero_centred)
    spelling, places = norm_of(Entries.of(state, form), form, name, dialect)
    entries = {role: x for role, (_, x) in places.items()}
    numbers = {key: x for role, (key, x) in places.items() if role in _NUMBERS}
    library, xp = (found := one_library(**numbers)), found.xp
    dtypes = {role: compute_dtype(library, key, x) for role, (key, x) in places.items() if role in _NUMBERS}
    gamma, beta, running, weight = entries.get("gamma"), entries.get("beta"), None, None
    if zero_centred and gamma is not None:
        gamma = 1 + library.astype(gamma, dtypes["gamma"])
    if not _STATISTICS.isdisjoint(entries):
        running = _running(library, entries, form, form.momentum if momentum is None else momentum)
        gamma, beta = (None if x is None else _in_one_axis(library, x) for x in (gamma, beta))
    if "v" in entries:
        v, g = entries["v"], entries["g"]
        full = len(g.shape) == len(v.shape)  # else one for each of the last axes
        axes = tuple(
            axis for axis, n in enumerate(v.shape) if (g.shape[axis] != 1 if full else axis >= v.ndim - g.ndim)
        )
        g = xp.reshape(g, tuple(g.shape[axis] for axis in axes)) if full else g
        weight = WeightNorm(v, g, axis=(axes if len(axes) > 1 else axes[0]) if axes else None)
    made: dict[str, Any] = {"gamma": gamma, "beta": beta, "running": running, "weight": weight}
    source = _Source(dialect, spelling, zero_centred, made, entries)
    eps = spelling.eps if eps is None else eps
    return NormParams(**made, eps=eps, zero_centred=zero_centred, source=source)


@checks_names
def to_checkpoint(params: NormParams[Any], name: str, *, dialect: str) -> dict[str, Any]:
    """The entries of a framework's checkpoint for one norm.

    Parameters
    ----------
    params : NormParams
        Of `from_checkpoint`, in whatever dialect, or made by hand.
    name : str
        The norm's, as in `from_checkpoint`.
    dialect : str
        As in `from_checkpoint`.

    Returns
    -------
    dict
        As the framework has it: flat for ``"torch"``, ``"equinox"``, ``"mlx"`` (with ``.``), ``"keras"`` and ``"onnx"``
        (with ``/``), mappings in mappings for the others. Arrays stay those of their library. What came from a
        checkpoint of this dialect, and is still the same object, is written as it was, bit for bit.

    Raises
    ------
    TypeError
        If `params` is not `NormParams`.
    ValueError
        If the dialect has no norm with all that `params` has.

    References
    ----------
    As in `from_checkpoint`.

    Examples
    --------
    See `NormParams`.

    >>> import numpy as np, anynorm
    >>> params = anynorm.from_checkpoint({"ln.weight": np.ones(2), "ln.bias": np.zeros(2)}, dialect="torch")
    >>> anynorm.to_checkpoint(params, "LayerNorm_0", dialect="flax")
    {'params': {'LayerNorm_0': {'scale': array([1., 1.]), 'bias': array([0., 0.])}}}
    """
    if not isinstance(params, NormParams):
        raise TypeError(f"params must be NormParams, got {type(params).__name__}")
    check_name(name)
    form, source = dialect_of(dialect), params.source
    has = {part for part in ("gamma", "beta", "running", "weight") if getattr(params, part) is not None}
    source = source if isinstance(source, _Source) and source.dialect == dialect else None
    for spelling in (source.spelling, *form.spellings) if source else form.spellings:
        holds = {_part(role) for role in spelling.entries}
        if has and has <= holds and has >= {_part(role) for role in spelling.needed}:
            break
    else:
        raise ValueError(
            f"params must have what a norm of dialect {dialect!r} has, got {', '.join(sorted(has)) or None}"
        )
    written: dict[str, Any] = {}
    for role, place in spelling.entries.items():
        value, was = getattr(params, _part(role)), source.entries.get(role) if source else None
        if value is None:
            continue
        kept = source is not None and value is source.fields[_part(role)]
        if source is not None and role == "gamma":
            kept = kept and params.zero_centred == source.zero_centred
        x = was if kept or (role == "batches" and was is not None) else _entry(role, params, form, was)
        if x is not None:
            *keys, last = levels(place, name, form)
            inner = written
            for level in keys:
                inner = inner.setdefault(level, {})
            inner[last] = x
    return written


# what a state holds


_STATISTICS = {"mean", "var", "average_mean", "average_var", "hidden_mean", "hidden_var"}
_NUMBERS = _STATISTICS | AFFINE | {"g", "v"}
ALL_SEEN = 2**30
"""So many updates that nothing is left of the start: of statistics that were not counted from it."""


def _part(role: str) -> str:
    """The field of `NormParams` that an entry is of."""
    return role if role in AFFINE else "weight" if role in ("g", "v") else "running"


def _in_one_axis(library: Library, x: Any) -> Any:
    return x if len(x.shape) == 1 else library.xp.reshape(x, (math.prod(x.shape),))


def _running(library: Library, entries: dict[str, Any], form: Dialect, momentum: float) -> RunningStats[Any]:
    """The statistics of a batch norm."""
    xp = library.xp
    mean, var = (
        _in_one_axis(library, next(entries[role] for role in (of, f"average_{of}", f"hidden_{of}") if role in entries))
        for of in ("mean", "var")
    )
    if "first" in entries and bool(entries["first"]):  # they hold anything
        mean, var = xp.zeros_like(mean), xp.ones_like(var)
    made = {"mean": mean, "var": var, "count": 0, "momentum": momentum, "correction": form.correction}
    if "counter_mean" in entries:
        updates = int(entries["counter_mean"])
        if "average_mean" not in entries:
            seen = 1 - momentum**updates or 1.0
            made |= {"mean": mean / seen, "var": var / seen}
        made |= {"debias": True, "_updates": updates}
    return RunningStats._made(made)


def _entry(role: str, params: NormParams[Any], form: Dialect, was: Any) -> Any:
    """What is written for a number, in the shape of what `was` there if that is of its size."""
    running, weight = params.running, params.weight
    x: Any = None
    if role in AFFINE:
        x = getattr(params, role)
        x = x - 1 if role == "gamma" and params.zero_centred else x
    elif weight is not None and role in ("g", "v"):
        x, axes = getattr(weight, role), weight.axis if isinstance(weight.axis, tuple) else (weight.axis,)
        if role == "g" and weight.axis is not None and not form.nested:
            kept = {axis % weight.v.ndim for axis in axes}
            x = library_of("g", x).xp.reshape(x, tuple(n if a in kept else 1 for a, n in enumerate(weight.v.shape)))
    elif running is not None:
        x = running.var if role.endswith("var") else running.mean
        library = library_of("mean", x)
        updates = ALL_SEEN if running._updates is None else running._updates
        if not is_number(updates):  # of which a checkpoint has one for all channels
            several = set(library.to_numpy(updates).ravel().tolist())
            updates = several.pop() if len(several) == 1 else ALL_SEEN
        if role not in _STATISTICS:
            numbers = {"first": False, "batches": 0}
            dtype = None if was is None else was.dtype
            return library.xp.asarray(numbers.get(role, updates), dtype=dtype, device=library.device_for_new(x))
        if role.startswith("hidden") and running.momentum is not None:
            x = x * (1 - running.momentum**updates)
        was = params.gamma if was is None and role.startswith(("average", "hidden")) else was
    if was is not None and math.prod(was.shape) == math.prod(x.shape):
        x = library_of(role, x).xp.reshape(x, tuple(was.shape))
    return x
