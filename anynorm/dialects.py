"""How frameworks call the numbers of a norm: one table, and the search for a norm in a checkpoint."""

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

AFFINE = {"gamma", "beta"}
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


class Entries(NamedTuple):
    """The entries of a checkpoint by the parts of their names, without outer keys: each a name and an array."""

    places: dict[Parts, list[tuple[str, Any]]]
    below: dict[Parts, set[Parts]]
    """Those entries whose names have one part more."""

    @staticmethod
    def of(state: Any, form: Dialect) -> "Entries":
        """Those of a mapping, nested or not."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping of names to arrays, got {type(state).__name__}")
        found = Entries({}, {})
        for keys, x in _leaves(state):
            parts = _stripped(tuple(part for key in keys for part in _parts(key)), form)
            found.places.setdefault(parts, []).append(("/".join(map(str, keys)), x))
            found.below.setdefault(parts[:-1], set()).add(parts)
        return found


Found = tuple[Spelling, dict[str, tuple[str, Any]]]


def _leaves(state: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if not isinstance(state, (Mapping, list, tuple)):
        if state is not None:  # what a layer has not, to a pytree
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


def norm_of(state: Entries, form: Dialect, name: str, dialect: str) -> Found:
    """The norm of that name; a ValueError unless there is exactly one."""
    check_name(name)
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


def check_name(name: Any) -> None:
    """An error unless a norm may be called so."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")


def _listed(names: list[str], near: str) -> str:
    """Names, of many those that are most like one."""
    shown = names if len(names) <= 12 else get_close_matches(near, names, 12, 0.0)
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(map(repr, shown)) + more if shown else "nothing"


def _found(state: Entries, form: Dialect, at: Parts) -> list[tuple[Spelling, dict[str, list[tuple[str, Any]]]]]:
    """The norms that are kept by one name: none or one, and more if it is ambiguous."""
    options = []
    for spelling in form.spellings:
        where = {role: _where(place, at) for role, place in spelling.entries.items()}
        entries = {role: state.places[parts] for role, parts in where.items() if parts in state.places}
        if not entries or not entries.keys() >= set(spelling.needed):
            continue
        mine = {where[role] for role in entries}
        shapes = {tuple(getattr(entries[role][0][1], "shape", ())) for role in AFFINE & entries.keys()}
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


def _names(state: Entries, form: Dialect) -> list[Parts]:
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


def dialect_of(name: str) -> Dialect:
    """The dialect of that name."""
    if not isinstance(name, str) or name not in DIALECTS:
        raise ValueError(f"dialect must be one of {', '.join(map(repr, DIALECTS))}, got {name!r}")
    return DIALECTS[name]


def levels(place: str, name: str, form: Dialect) -> list[Any]:
    """The keys under which an entry is written."""
    parts = _parts(name)
    inner = "|".join((*parts[:-2], *parts[-1:]))
    levels = place.format(name="|".join(parts) if form.nested else name, inner=inner).split("|")
    keys = [level.lstrip("./") for level in levels if level]
    return [tuple(key[1:-1].split("/")) if key.startswith("(") else key for key in keys]
