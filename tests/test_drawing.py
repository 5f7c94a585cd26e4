"""Which cases of a test run where not all do: each on one backend in turn, and none on none."""

from types import SimpleNamespace

import pytest
from backends import drawn

pytestmark = pytest.mark.cells("numpy")


class Item(SimpleNamespace):
    __hash__ = object.__hash__


def items(test, cases, backends, *cells):
    """As pytest collects them: a case of a test on each backend."""
    markers = [pytest.mark.cells(*cells).mark] if cells else []
    return [
        Item(
            nodeid=f"tests/test_a.py::{test}[{backend}-{case}]",
            name=f"{test}[{backend!r}-{case}]",
            callspec=SimpleNamespace(params={"backend": backend, "case": case}),
            iter_markers=lambda _: iter(markers),
            is_of=(test, case, backend),
        )
        for case in range(cases)
        for backend in backends
    ]


def of(found):
    return [item.is_of for item in found]


def test_each_case_runs_on_the_next_backend_and_a_test_of_one_case_on_all():
    kept, left = drawn(items("many", 5, "ab") + items("one", 1, "ab"), "backend")
    assert of(kept) == [("many", i, "ab"[i % 2]) for i in range(5)] + [("one", 0, "a"), ("one", 0, "b")]
    assert of(left) == [("many", i, "ba"[i % 2]) for i in range(5)]


def test_one_in_so_many_runs_and_every_second_of_the_tests_of_one_case():
    tests = items("many", 7, "a") + items("one", 1, "a") + items("two", 1, "a") + items("own", 7, "a", "jax")
    kept, left = drawn(tests, "backend", 3)
    assert of(kept) == [("many", i, "a") for i in (0, 3, 6)] + [("two", 0, "a")] + [("own", i, "a") for i in range(7)]
    assert len(kept) + len(left) == len(tests)


def test_a_first_look_takes_few_of_the_tests_about_one_library_and_of_those_of_one_case():
    tests = items("own", 9, "a", "numpy") + [item for i in range(8) for item in items(f"one{i}", 1, "a")]
    kept, _ = drawn(tests, "backend", 8, 8)
    assert of(kept) == [("own", 0, "a"), ("own", 8, "a"), ("one3", 0, "a"), ("one7", 0, "a")]
