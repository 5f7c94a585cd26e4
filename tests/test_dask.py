"""Dask: nothing is computed at a call, and chunks make no difference."""

import numpy as np
import pytest
from oracles import CASES, values

import anynorm

pytestmark = pytest.mark.cells("dask")


@pytest.fixture
def counted():
    """A scheduler that counts how often it is called."""
    import dask

    calls = []

    def scheduler(graph, keys, **options):
        calls.append(keys)
        return dask.get(graph, keys, **options)

    with dask.config.set(scheduler=scheduler):
        yield calls


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_call_computes_nothing(backend, counted, case):
    rng = np.random.default_rng(0)
    numbers = [rng.standard_normal(case.shape), *rng.standard_normal((case.parameters, *case.parameter_shape))]
    arrays = [backend.array(each) for each in numbers]
    y, pullback = anynorm.vjp(case.norm, *arrays, **case.options)
    gradients = pullback(arrays[0])
    case.norm(*arrays, **case.options)
    assert not counted
    backend.check(y, values(case, *numbers, None)[...] if case.parameters == 1 else values(case, *numbers))
    assert counted
    assert all(tuple(each.shape) == tuple(array.shape) for each, array in zip(gradients, arrays, strict=True))


@pytest.mark.parametrize("chunks", [(1, 1, 1), (2, 3, 4), (4, 6, 5), (3, 2, 5)])
def test_chunks_make_no_difference(backend, chunks):
    import dask.array

    x = np.random.default_rng(1).standard_normal((4, 6, 5))
    chunked = dask.array.from_array(x, chunks=chunks)
    for norm, options in (
        (anynorm.layer_norm, {}),
        (anynorm.batch_norm, {}),
        (anynorm.instance_norm, {}),
        (anynorm.group_norm, {"groups": 2}),
    ):
        backend.check(norm(chunked, **options), norm(x, **options))


def test_masked_chunks_are_refused():
    import dask.array

    masked = dask.array.ma.masked_array(np.ones((2, 3)), mask=np.eye(2, 3, dtype=bool))
    with pytest.raises(TypeError, match=r"^x must be a plain array, got one that is masked$"):
        anynorm.layer_norm(masked)


def test_sizes_that_are_not_known_do_no_harm_where_they_are_not_counted(backend):
    import dask.array

    x = np.random.default_rng(2).standard_normal((6, 4, 5))
    known = x[x[:, 0, 0] > 0]
    unknown = dask.array.from_array(x, chunks=(2, 4, 5))
    unknown = unknown[unknown[:, 0, 0] > 0]
    y, moments = anynorm.layer_norm(unknown, return_moments=True)
    np.testing.assert_allclose(y.compute(), anynorm.layer_norm(known))
    np.testing.assert_allclose(moments.mean.compute(), known.mean(axis=-1))
    np.testing.assert_allclose(anynorm.instance_norm(unknown).compute(), anynorm.instance_norm(known))
    running = anynorm.RunningStats.init(4, like=unknown)
    np.testing.assert_allclose(anynorm.batch_norm(unknown, moments=running).compute(), known / (1 + 1e-5) ** 0.5)
    y, pullback = anynorm.vjp(anynorm.layer_norm, unknown)
    expected = anynorm.vjp(anynorm.layer_norm, known)[1](known)[0]
    np.testing.assert_allclose(pullback(unknown)[0].compute(), expected, atol=1e-12)
    message = "^x must have known sizes where it is divided and counted, got shape "
    for norm, options in ((anynorm.batch_norm, {}), (anynorm.group_norm, {"groups": 2})):
        with pytest.raises(ValueError, match=message):
            norm(unknown, **options)
