"""Checkpoints of frameworks: one table of what they call the numbers of a norm, and of what they mean by them."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from difflib import get_close_matches
from typing import Any, Generic, NamedTuple, TypeVar

from anynorm.arrays.checks import check_bool, check_real, compute_dtype
from anynorm.arrays.counts import is_number
from anynorm.arrays.library import Library
from anynorm.arrays.recognize import library_of, one_library
from anynorm.keywords import checks_names
from anynorm.state import RunningStats
from anynorm.statistics import describe
from anynorm.weight import WeightNorm

ArrayT = TypeVar("ArrayT")
Parts = tuple[str, ...]


class Spelling(NamedTuple):
    """How a framework keeps a kind of norm."""

    kind: str
    needed: Parts
    """Those without which it is not that kind."""
    eps: float | None
    """The default."""
    entries: dict[str, str]
    """Where each number is. ``{name}`` is the norm's name, ``{inner}`` that without its last part but one, and before
    each ``|`` is the key of a mapping."""


class Dialect(NamedTuple):
    """What a framework writes, and what it means by it."""

    momentum: float
    """The default, as the weight of the old value."""
    correction: float
    outer: Parts
    """Keys that may come before a name, and are none of it."""
    spellings: tuple[Spelling, ...]
    nested: bool = False
    """Whether each part of a name is the key of a mapping."""


def _kept(kind: str, at: str, needed: str = "", eps: float | None = 1e-5, /, **entries: str) -> Spelling:
    return Spelling(kind, tuple(needed.split()), eps, {role: at * ("{" not in x) + x for role, x in entries.items()})


def _ema(name: str) -> dict[str, str]:
    return {f"{role}_{name}": f"state|{{name}}/~/{name}_ema|{role}" for role in ("average", "hidden", "counter")}


_WEIGHT: Any = ("g v", None)
_TORCH = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "var": "running_var"}
_FLAX = {"gamma": "scale", "beta": "bias"}
_KERAS = {"gamma": "gamma", "beta": "beta"}

DIALECTS = {
    "torch": Dialect(
        *(1 - 0.1, 1, ("state_dict", "model_state_dict", "model", "module")),
        (
            _kept("batch norm", "{name}.", "mean var", **_TORCH, batches="num_batches_tracked"),
            _kept("other norms", "{name}.", "gamma", gamma="weight", beta="bias"),
            _kept("weight norm", "{name}.", *_WEIGHT, g="weight_g", v="weight_v"),
            _kept("weight norm", "{name}.parametrizations.weight.", *_WEIGHT, g="original0", v="original1"),
        ),
    ),
    "keras": Dialect(
        *(0.99, 0, ("model_weights", "layers")),
        (
            _kept("batch norm", "{name}/", "mean var", 1e-3, **_KERAS, mean="moving_mean", var="moving_variance"),
            _kept("layer and group norm", "{name}/", "", 1e-3, **_KERAS),
            _kept("RMS norm", "{name}/", "gamma", 1e-6, gamma="scale"),
            _kept(
                *("batch norm, .weights.h5", "{name}/vars/", "gamma beta mean var", 1e-3),
                **{"gamma": "0", "beta": "1", "mean": "2", "var": "3"},
            ),
        ),
    ),
    "flax": Dialect(
        *(0.99, 0, ("variables", "params", "batch_stats")),
        (
            _kept(
                *("batch norm", "params|{name}|", "mean var"),
                **_FLAX | {each: f"batch_stats|{{name}}|{each}" for each in ("mean", "var")},
            ),
            _kept("other norms", "params|{name}|", "", 1e-6, **_FLAX),
            _kept("weight norm", "params|", *_WEIGHT, g="params|{name}/kernel/scale", v="params|{inner}|kernel"),
        ),
        nested=True,
    ),
    "nnx": Dialect(
        *(0.99, 0, ()),
        (
            _kept("batch norm", "{name}|", "mean var", **_FLAX, mean="mean", var="var"),
            _kept("other norms", "{name}|", "", 1e-6, **_FLAX),
            _kept("weight norm", "{name}|", *_WEIGHT, g="scales|(kernel)", v="layer_instance|kernel"),
        ),
        nested=True,
    ),
    "equinox": Dialect(
        *(0.99, 0, ()),
        (
            _kept(
                *("batch norm, ema", "{name}.", "mean var"),
                **_TORCH | {"mean": "ema_state_index.0", "var": "ema_state_index.1", "first": "ema_first_time_index"},
            ),
            _kept(
                *("batch norm, batch", "{name}.", "hidden_mean hidden_var counter_mean"),
                **{"gamma": "weight", "beta": "bias", "counter_mean": "batch_counter"},
                **{"hidden_mean": "batch_state_index.0", "hidden_var": "batch_state_index.1"},
            ),
            _kept("other norms", "{name}.", "gamma", gamma="weight", beta="bias"),
            _kept("weight norm", "{name}.", *_WEIGHT, g="g", v="layer.weight"),
        ),
    ),
    "haiku": Dialect(
        *(0.9, 0, ("params", "state")),
        (
            _kept(
                *("batch norm", "params|{name}|", "average_mean average_var"),
                **{"gamma": "scale", "beta": "offset"} | _ema("mean") | _ema("var"),
            ),
            _kept("other norms", "params|{name}|", gamma="scale", beta="offset"),
        ),
    ),
    "mlx": Dialect(
        *(1 - 0.1, 1, ()),
        (
            _kept("batch norm", "{name}.", "mean var", **_TORCH),
            _kept("other norms", "{name}.", "gamma", gamma="weight", beta="bias"),
        ),
    ),
    "onnx": Dialect(
        *(0.9, 0, ()),
        (
            _kept("batch norm", "{name}/", "mean var", gamma="scale", beta="B", mean="input_mean", var="input_var"),
            _kept("instance and RMS norm", "{name}/", "gamma", gamma="scale", beta="B"),
            _kept("layer norm", "{name}/", "gamma", gamma="Scale", beta="B"),
            _kept("group norm", "{name}/", "gamma beta", gamma="scale", beta="bias"),
        ),
    ),
}
"""In each the spelling comes first that is written where more than one could be."""


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
    running: RunningStats[ArrayT] | None = None
    weight: WeightNorm[ArrayT] | None = None
    eps: float | None = 1e-5
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
    form = _dialect(dialect)
    check_bool("zero_centred", zero_centred)
    spelling, places = _norm_of(_State.of(state, form), form, name, dialect)
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
        g = xp.reshape(g, tuple(v.shape[axis] for axis in axes) if full else tuple(g.shape))
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
    form, source = _dialect(dialect), params.source
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
            *levels, last = _levels(place, name, form)
            inner = written
            for level in levels:
                inner = inner.setdefault(level, {})
            inner[last] = x
    return written


# what a state holds


class _State(NamedTuple):
    """The entries of a checkpoint by the parts of their names, without outer keys: each a name and an array."""

    places: dict[Parts, list[tuple[str, Any]]]
    below: dict[Parts, set[Parts]]
    """Those entries whose names have one part more."""

    @staticmethod
    def of(state: Any, form: Dialect) -> "_State":
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping of names to arrays, got {type(state).__name__}")
        found = _State({}, {})
        for keys, x in _leaves(state):
            parts = _stripped(tuple(part for key in keys for part in _parts(key)), form)
            found.places.setdefault(parts, []).append(("/".join(map(str, keys)), x))
            found.below.setdefault(parts[:-1], set()).add(parts)
        return found


Found = tuple[Spelling, dict[str, tuple[str, Any]]]


def _leaves(state: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if not isinstance(state, (Mapping, list, tuple)):
        yield keys, state
        return
    for key in state if isinstance(state, Mapping) else range(len(state)):
        yield from _leaves(state[key], (*keys, key))


def _parts(name: Any) -> Parts:
    """The parts of a name, a key of several among them."""
    if isinstance(name, tuple):
        return tuple(part for each in name for part in _parts(each))
    return tuple(part.removesuffix(":0") for part in re.split(r"[./|()]", str(name)) if part)


def _stripped(parts: Parts, form: Dialect) -> Parts:
    while parts and parts[0] in form.outer:
        parts = parts[1:]
    return parts


def _norm_of(state: _State, form: Dialect, name: str, dialect: str) -> Found:
    """The norm of that name; a ValueError unless there is exactly one."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    at = _stripped(_parts(name), form)
    found = _found(state, form, at)
    if not found:
        names = _names(state, form)
        if not names:
            keys = [key for places in state.places.values() for key, _ in places]
            raise ValueError(f"state must hold a norm of dialect {dialect!r}, got {_listed(keys, name)}")
        if at or len(names) > 1:
            shown = [("/" if form.nested else ".").join(each) for each in names]
            raise ValueError(f"name must be that of a norm in state, {_listed(shown, name)}, got {name!r}")
        found = _found(state, form, names[0])
    if len(found) > 1 or any(len(places) > 1 for places in found[0][1].values()):
        keys = [key for _, entries in found for places in entries.values() for key, _ in places]
        raise ValueError(f"state must hold one norm by the name {name!r}, got {_listed(sorted(set(keys)), name)}")
    spelling, entries = found[0]
    return spelling, {role: places[0] for role, places in entries.items()}


def _listed(names: list[str], near: str) -> str:
    """Names, of many those that are most like one."""
    shown = names if len(names) <= 12 else get_close_matches(near, names, 12, 0.0)
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(map(repr, shown)) + more if shown else "nothing"


def _found(state: _State, form: Dialect, at: Parts) -> list[tuple[Spelling, dict[str, list[tuple[str, Any]]]]]:
    """The norms that are kept by one name: none or one, and more if it is ambiguous."""
    options = []
    for spelling in form.spellings:
        where = {role: _where(place, at) for role, place in spelling.entries.items()}
        entries = {role: state.places[parts] for role, parts in where.items() if parts in state.places}
        if not entries or not entries.keys() >= set(spelling.needed):
            continue
        mine = {where[role] for role in entries}
        shapes = {tuple(getattr(entries[role][0][1], "shape", ())) for role in _AFFINE & entries.keys()}
        # else it is another layer, which has a bias too
        if "v" in entries or (state.below.get(at, set()) <= mine and len(shapes) < 2):
            options.append((spelling, entries, mine))
    every = set().union(*(mine for *_, mine in options))
    whole = [option for option in options if option[2] == every]
    if whole:
        options = [min(whole, key=lambda option: len(option[0].entries))]
    return [(spelling, entries) for spelling, entries, _ in options]


def _where(place: str, at: Parts) -> Parts:
    """The parts of the name of an entry, without outer keys."""
    before, inner, after = place.partition("{inner}")
    if inner:
        return (*at[:-2], *at[-1:], *_parts(after))
    return (*at, *_parts(before.partition("{name}")[2]))


def _names(state: _State, form: Dialect) -> list[Parts]:
    """The names of all norms."""
    ends = {_where(place, ()) for spelling in form.spellings for place in spelling.entries.values()}
    names = dict.fromkeys(
        parts[: len(parts) - len(end)] for parts in state.places for end in ends if parts[-len(end) :] == end
    )
    norms = {at: found for at in names if (found := _found(state, form, at))}
    weights = {
        id(places) for found in norms.values() for _, entries in found if "v" in entries for places in entries.values()
    }
    return [
        at
        for at, found in norms.items()
        if any("v" in entries or not {id(places) for places in entries.values()} <= weights for _, entries in found)
    ]


def _dialect(name: str) -> Dialect:
    if name not in DIALECTS:
        raise ValueError(f"dialect must be one of {', '.join(map(repr, DIALECTS))}, got {name!r}")
    return DIALECTS[name]


def _levels(place: str, name: str, form: Dialect) -> list[Any]:
    """The keys under which an entry is written."""
    parts = _parts(name)
    inner = "|".join((*parts[:-2], *parts[-1:]))
    levels = place.format(name="|".join(parts) if form.nested else name, inner=inner).split("|")
    keys = [level.lstrip("./") for level in levels if level]
    return [tuple(key[1:-1].split("/")) if key.startswith("(") else key for key in keys]


# what it means

_STATISTICS = {"mean", "var", "average_mean", "average_var", "hidden_mean", "hidden_var"}
_AFFINE = {"gamma", "beta"}
_NUMBERS = _STATISTICS | _AFFINE | {"g", "v"}
ALL_SEEN = 2**30
"""So many updates that nothing is left of the start: of statistics that were not counted from it."""


def _part(role: str) -> str:
    """The field of `NormParams` that an entry is of."""
    return role if role in _AFFINE else "weight" if role in ("g", "v") else "running"


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
    if role in _AFFINE:
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
        updates = running._updates if is_number(running._updates) else ALL_SEEN
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
