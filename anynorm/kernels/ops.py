"""Arithmetic whose results go where an executor wants them."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

Array = Any
Namespace = Any


class Ops(NamedTuple):
    """Where the arrays of x's size go that a kernel makes one of another: each is new, or all have one place.

    A kernel therefore makes no use of such an array once it has made the next of it.
    """

    add: Callable[[Array, Array], Array]
    subtract: Callable[[Array, Array], Array]
    multiply: Callable[[Array, Array], Array]
    multiply_add: Callable[[Array, Array, Array], Array]
    """x * factor + addend, in one pass where the library can; the addend is not in the place of the result."""


def multiply_add(x: Array, factor: Array, addend: Array) -> Array:
    """`x * factor + addend`."""
    return x * factor + addend


PURE = Ops(operator.add, operator.sub, operator.mul, multiply_add)


class Outputs(NamedTuple):
    """Where a gradient's arrays of x's size go: the result; xhat, which is used up; products, which are added up."""

    result: Ops = PURE
    xhat: Ops = PURE
    product: Ops = PURE


NEW = Outputs()
