"""What the kernels do for the sake of a library's speed: other runs of the same sums."""

import numpy as np
import pytest

from anynorm.arrays.recognize import library_of
from anynorm.kernels import Sums, reductions

LENGTHS = [1, 2, 5, 64, 97, 128, 129, 1009, 1024, 6272]


def library(backend):
    """As the kernels are given it: NumPy before 2.0 lacks some of the standard."""
    return library_of("x", backend.array(np.ones(1), "float32"))


@pytest.mark.cells("numpy", "strict")
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("rows", [1, 3, 500, 501])
def test_products_are_added_in_runs_of_any_length(backend, rows, n):
    rng = np.random.default_rng(n)
    x, other = rng.standard_normal((2, rows, n)).astype(np.float32)
    arrays = [backend.array(each, "float32") for each in (x, other, other[:1])]
    groups = Sums((1,), 1.0, 256, backend.xp.ones_like(arrays[0])[0, ...])
    for second, wide in ((arrays[1], other), (arrays[2], other[:1])):
        found = backend.numpy(groups.mean_product(library(backend).xp, arrays[0], second))
        exact = np.sum(x.astype(np.float64) * wide, axis=1, keepdims=True)
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6 * n**0.5 * 4)
    found = backend.numpy(groups.mean(library(backend).xp, arrays[0]))
    np.testing.assert_allclose(found, np.sum(x.astype(np.float64), axis=1, keepdims=True), rtol=0, atol=1e-6 * n**0.5)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("shape", [(256, 1024), (167, 6272), (4, 64, 3136), (30, 5000), (400, 2**20), (1, 2**22)])
def test_other_threads_run_while_numpy_adds(shape):
    run = reductions._longest(shape, len(shape) - 1)
    assert shape[-1] % run == 0
    assert run <= reductions.RUN
    assert np.prod(shape) // run > reductions.LOCKED
