"""Frozen dataclasses that JAX takes as pytrees, where JAX is there."""

import sys
import threading
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from anynorm.arrays.counts import split_number

T = TypeVar("T")


def pytree(*leaves: str) -> Callable[[type[T]], type[T]]:
    """Make a frozen dataclass a JAX pytree, as soon as JAX is there, of these fields; the others are static.

    A count that is a Python number crosses as a float, as int32 would overflow; without float64 as two of float32.
    """

    def register(kind: type[T]) -> type[T]:
        static = tuple(field.name for field in fields(kind) if field.name not in leaves)  # type: ignore[arg-type]

        def flatten(value: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            parts = {name: getattr(value, name) for name in leaves}
            if isinstance(count := parts.get("count"), (int, float)):
                wide = sys.modules["jax"].config.jax_enable_x64
                parts["count"], parts["_count_rest"] = (float(count), None) if wide else split_number(count)
            return tuple(parts.values()), tuple(getattr(value, name) for name in static)

        def unflatten(options: tuple[Any, ...], children: tuple[Any, ...]) -> T:
            value = object.__new__(kind)  # unchecked: JAX also passes placeholders
            parts = dict(zip((*leaves, *static), (*children, *options), strict=True))
            if isinstance(count := parts.get("count"), float):
                halves = [count, parts["_count_rest"] or 0.0]
                integral = all(half.is_integer() for half in halves)
                parts["count"], parts["_count_rest"] = sum(map(int, halves)) if integral else sum(halves), None
            for name, part in parts.items():
                object.__setattr__(value, name, part)
            return value

        _pytrees.append((kind, flatten, unflatten))
        flush_pytrees()
        return kind

    return register


def flush_pytrees() -> None:
    """Register with JAX what still waits for it; JAX is never imported for it."""
    if _pytrees and sys.modules.get("jax") is not None:
        with _pytrees_lock:
            while _pytrees:
                sys.modules["jax"].tree_util.register_pytree_node(*_pytrees.pop())


_pytrees: list[tuple[type, Callable[..., Any], Callable[..., Any]]] = []
_pytrees_lock = threading.Lock()
