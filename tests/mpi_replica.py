"""One of several processes of MPI, for `test_all_reduce.py`, with the function that docs/masks.md names."""

import json
import sys

import numpy as np
from mpi4py import MPI

import anynorm


def main(sizes: list[int]) -> None:
    """Every result and gradient of this rank's samples, against those of the whole batch in this process alone."""
    comm = MPI.COMM_WORLD
    rank = comm.Get_rank()
    assert comm.Get_size() == len(sizes)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, sum(sizes), 3, 4))
    gamma, beta = rng.standard_normal((2, 3))
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    for mask in (None, rng.random((sum(sizes), 1, 4)) > 0.3):
        for dtype, tolerance in ((np.float64, 1e-11), (np.float32, 2e-5)):
            for offset in (0, 1e6 if dtype == np.float64 else 1e3):
                arrays = [each.astype(dtype) for each in (x + offset, gamma, beta, dy)]
                found = step(arrays, own, mask, lambda a: comm.Allreduce(MPI.IN_PLACE, a))
                expected = step(arrays, slice(None), mask, None)
                for i, (one, other) in enumerate(zip(found, expected, strict=True)):
                    other = other[own] if i < 2 else other
                    np.testing.assert_allclose(one, other, rtol=tolerance * 1e2, atol=tolerance * max(1, offset * 10))
    comm.Barrier()
    print("done")


def step(arrays, own, mask, all_reduce):
    """y, the gradients, the moments."""
    x, gamma, beta, dy = arrays
    weights = None if mask is None else mask[own]
    (y, moments), pullback = anynorm.vjp(
        anynorm.batch_norm, x[own], gamma, beta, weights=weights, all_reduce=all_reduce, return_moments=True
    )
    dx, *parameters = pullback(dy[own])
    return y, dx, *parameters, moments.mean, moments.var, moments.count + np.zeros(3)


main(json.loads(sys.argv[1]))
