"""Large arrays are run in blocks, which shows in memory and nowhere else."""

import tracemalloc

import numpy as np
import pytest
from oracles import CASES, Case, values

import anynorm
from anynorm import schedules


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few numbers; how many parts were run."""
    run, parts = schedules._Run.part, []
    monkeypatch.setattr(schedules._Run, "part", lambda *args, **options: parts.append(args) or run(*args, **options))
    with anynorm.options(block_bytes=16):
        yield parts


@pytest.mark.cells("numpy", "strict")
@pytest.mark.parametrize("kind", ["short", "full-rank"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_make_no_difference(backend, small_blocks, case, kind):
    rng = np.random.default_rng(0)
    shape = case.parameter_shape if kind == "short" else case.shape
    x, params = rng.standard_normal(case.shape) + 1e2, [rng.standard_normal(shape) for _ in range(case.parameters)]
    y = case.norm(backend.array(x), *map(backend.array, params), **case.options)
    tolerance = None if backend.float64 else 1e-4
    backend.check(y, values(case, x, *params, *[None] * (2 - len(params))), tolerance=tolerance)
    assert small_blocks


@pytest.mark.cells("numpy", "strict")
def test_moments_of_blocks_are_those_of_the_whole(backend, small_blocks):
    x = np.random.default_rng(1).standard_normal((6, 4, 5, 3))
    for norm, options, axes in (
        (anynorm.layer_norm, {"axis": (2, 3)}, (2, 3)),
        (anynorm.batch_norm, {}, (0, 2, 3)),
        (anynorm.instance_norm, {}, (2, 3)),
    ):
        small_blocks.clear()
        _, moments = norm(backend.array(x), return_moments=True, **options)
        assert len(small_blocks) > 1
        backend.check(moments.mean, x.mean(axis=axes))
        backend.check(moments.var, x.var(axis=axes))


@pytest.mark.cells("numpy", "strict")
def test_given_moments_are_divided_with_the_array(backend, small_blocks):
    case = Case(anynorm.batch_norm, (4, 3, 2), {}, lambda i: i[1], lambda i: (i[1],), (3,))
    rng = np.random.default_rng(2)
    x, mean, var = rng.standard_normal(case.shape), rng.standard_normal(3), rng.random(3)
    given = anynorm.Moments(backend.array(mean), backend.array(var), 5)
    y = anynorm.batch_norm(backend.array(x), moments=given)
    assert len(small_blocks) > 1
    backend.check(y, values(case, x, None, None, given=dict(enumerate(zip(mean, var, strict=True)))))


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_large_array_needs_little_more_than_its_result(dtype):
    x = np.ones((16, 64, 128, 128), dtype=dtype)
    for norm, options in (
        (anynorm.layer_norm, {"axis": (2, 3)}),
        (anynorm.batch_norm, {}),
        (anynorm.group_norm, {"groups": 32}),
        (anynorm.rms_norm, {}),
    ):
        tracemalloc.start()
        norm(x, **options)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < x.nbytes + 8 * 2**20


@pytest.mark.cells("numpy", "torch")
def test_a_group_without_numbers_leaves_the_gradient_of_the_others_exact(backend):
    x = np.random.default_rng(4).standard_normal((4, 50_000)) + 1e6
    dy = np.random.default_rng(5).standard_normal(x.shape)
    given = backend.array(x, "float32")
    broken = x.copy()
    broken[3] = np.nan
    gradients = []
    for each in (given, backend.array(broken, "float32")):
        _, pullback = anynorm.vjp(anynorm.layer_norm, each)
        gradients.append(backend.numpy(pullback(backend.array(dy, "float32"))[0])[:3])
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-5)
