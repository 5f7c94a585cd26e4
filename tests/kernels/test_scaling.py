"""Powers of two: when they are looked for, and how far they may go."""

import inner
import numpy as np
import pytest

import anynorm
from anynorm import kernels


@pytest.mark.cells("numpy", "torch")
def test_a_power_of_two_is_looked_for_only_where_it_is_needed(backend, monkeypatch):
    calls = inner.count_scales(monkeypatch)
    x = backend.array(np.random.default_rng(0).standard_normal((8, 64)), "float32")
    on_gpu = backend.library == "torch" and x.is_cuda  # there a look at the numbers costs more than the pass it saves
    with anynorm.options(engine="auto" if backend.library == "cupy" else "arrays"):  # programs on a processor need none
        for norm in (anynorm.layer_norm, anynorm.batch_norm, anynorm.rms_norm):
            norm(x)
            norm(x, eps=0)
        assert len(calls) == (6 if on_gpu else 0)
        for scale, eps, needed in ((1e30, 1e-5, True), (1e-30, 1e-5, False), (1e-30, 0, True)):
            calls.clear()
            anynorm.layer_norm(x * scale, eps=eps)
            assert len(calls) == (needed or on_gpu)


@pytest.mark.cells("numpy", "strict", "torch", "jax", "cupy")
def test_the_limits_are_what_they_say(backend):
    for dtype in {"float32", backend.widest}:
        info = np.finfo(dtype)
        limits = kernels.limits(backend.xp, backend.array(np.ones(1), dtype).dtype)
        largest, smallest = float(info.max), float(info.smallest_normal)
        for level in (limits.large, largest / limits.step / limits.further, limits.small * limits.step):
            assert level**2 * 2.0**31 <= largest
        for level in (limits.small, limits.large / limits.step, smallest * limits.step * limits.further):
            assert (level * float(info.eps) / 2) ** 2 >= smallest
