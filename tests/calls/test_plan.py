"""What is kept of a call for the next one like it."""

import gc
import weakref

import inner
import numpy as np
import pytest
from oracles import standardized

import anynorm


@pytest.mark.cells("numpy")
def test_a_plan_is_kept_for_arguments_that_are_truly_alike():
    x = np.random.default_rng(0).standard_normal((4, 6, 5))
    anynorm.layer_norm(x, axis=(0, 1))
    anynorm.layer_norm(x, axis=1)
    for wrong in ([0, 1], True, (0, True), 1.0):
        with pytest.raises(TypeError, match="axis must be"):
            anynorm.layer_norm(x, axis=wrong)
    anynorm.layer_norm(x, eps=1)
    with pytest.raises(TypeError, match="eps must be"):
        anynorm.layer_norm(x, eps=True)
    np.testing.assert_array_equal(anynorm.layer_norm(x, eps=-0.0), anynorm.layer_norm(x, eps=0))
    for dtype in ("<f4", ">f4", "<f8", ">f8", "float16", "longdouble"):
        y = anynorm.layer_norm(x.astype(dtype))
        assert y.dtype == np.dtype(dtype)
        np.testing.assert_allclose(y, standardized(x, 2), atol=5e-3)
    with pytest.raises(TypeError, match="plain array"):
        anynorm.layer_norm(np.ma.masked_array(x))


@pytest.mark.cells("numpy")
def test_plans_are_few_and_keep_no_array(monkeypatch):
    plans = inner.forget_plans(monkeypatch, most=5)
    for n in range(1, 40):
        anynorm.layer_norm(np.ones((2, n)))
        assert len(plans) <= 5
    x, gamma, out = np.ones((300, 400)), np.ones(400), np.ones((300, 400))
    with anynorm.options(threads=2, block_bytes=1000):
        anynorm.vjp(anynorm.layer_norm, x, gamma, out=out)[1](x)
    alive = [weakref.ref(each) for each in (x, gamma, out)]
    del x, gamma, out
    gc.collect()
    assert [each() for each in alive] == [None] * 3
