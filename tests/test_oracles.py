"""What results are held to: the formulas on whole arrays are those of the loops over single numbers."""

import numpy as np
import pytest
from oracles import CASES, derived, exact, statistics

import anynorm

pytestmark = pytest.mark.cells("numpy-cpu")


KINDS = ("short", "full-rank", "one number")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("case", "kind"), [*zip(CASES, KINDS * len(CASES), strict=False)][::2], ids=str)
def test_the_formulas_are_those_of_the_loops_and_their_differences(case, weighted, kind):
    if weighted and case.norm is anynorm.weight_norm:
        pytest.skip(reason="weight norm has no weights")
    rng, rank = np.random.default_rng(0), len(case.shape)
    x, dy = rng.standard_normal(case.shape) + 1, rng.standard_normal(case.shape)
    shape = {"short": case.parameter_shape, "full-rank": case.shape, "one number": (1,) * rank}[kind]
    params = [*map(np.asarray, rng.standard_normal((case.parameters, *shape))), None][:2]
    weights = {"weights": rng.random(case.shape) * (rng.random(case.shape) > 0.2)} if weighted else {}
    expected = derived(case, [x, *params], dy, **weights)
    found = exact(case.norm, x, dy, *params, **weights, **case.options)
    for one, other in zip([each for each in found[:4] if each is not None], expected, strict=True):
        np.testing.assert_allclose(one.astype(float), other, rtol=1e-8, atol=1e-8)
    sets = {}
    for index in np.ndindex(*case.shape):
        sets.setdefault(case.set_of(index), []).append((x[index], weights["weights"][index] if weighted else 1.0))
    mean, var = np.transpose([statistics(case, numbers) for numbers in sets.values()])
    np.testing.assert_allclose(found.mean.astype(float).ravel(), mean, atol=1e-12)
    np.testing.assert_allclose(found.var.astype(float).ravel(), var, atol=1e-12)
    given = rng.standard_normal(len(sets)), rng.random(len(sets))
    if case.norm is not anynorm.weight_norm:
        expected = derived(case, [x, *params], dy, given=dict(zip(sets, zip(*given, strict=True), strict=True)))
        found = exact(case.norm, x, dy, *params, moments=given, **case.options)
        for one, other in zip([each for each in found[:4] if each is not None], expected, strict=True):
            np.testing.assert_allclose(one.astype(float), other, rtol=1e-8, atol=1e-8)
