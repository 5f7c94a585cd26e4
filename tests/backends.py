"""The array library of a cell, in the little that the tests need of it. Arrays are made on a device that is not the
default one wherever there is a second."""

import os
from collections import defaultdict
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from array_api_extra.testing import assert_close
from cells import Cell


class Missing(Exception):
    """A cell was asked for that cannot run here."""


CELL, BACKENDS = pytest.StashKey[Cell](), pytest.StashKey[list["Backend"]]()
"""What a run of pytest tests."""
EVERY = pytest.StashKey[tuple[int, int]]()
"""One in how many cases of a test it runs; and of a test that is about one library."""


@dataclass(frozen=True)
class Backend:
    """A library on one device."""

    library: str
    xp: Any
    device: Any
    float64: bool = True
    tracked: bool = False
    """Arrays require a gradient: the path on which PyTorch records."""

    def __repr__(self) -> str:
        return f"{self.library}-{self.device}{'-grad' if self.tracked else ''}"

    @property
    def widest(self) -> str:
        """The widest dtype there is."""
        return "float64" if self.float64 else "float32"

    @property
    def narrow(self) -> list[str]:
        """The dtypes narrower than float64."""
        if self.library in ("strict", "plain", "sparse", "cubed", "ndonnx"):
            return ["float32"]
        return ["float16", "bfloat16", "float32"]

    @property
    def tolerance(self) -> float:
        """What a short computation in the widest dtype may be off by."""
        return 1e-11 if self.float64 else 2e-5

    def dtype(self, name: str) -> Any:
        if name == "bfloat16" and self.library in ("numpy", "cupy", "dask", "autograd"):
            return import_module("ml_dtypes").bfloat16
        if name == "bool" and self.library == "numpy":  # which has had the name from 2.0 on
            return np.dtype(bool)
        if self.library == "mlx" and name == "bool":
            return self.xp.bool_
        return getattr(self.xp, name)

    def array(self, values: Any, dtype: str | None = None) -> Any:
        """The values in this library, on this device, in the widest dtype unless another is named."""
        dtype = dtype or self.widest
        values = np.asarray(values)
        if self.library == "torch":
            # through float64, as PyTorch takes neither negative strides nor foreign dtypes
            array = self.xp.asarray(values.astype(np.float64), device=self.device).to(self.dtype(dtype))
            return array.requires_grad_() if self.tracked else array
        if self.library == "dask":
            dtype = self.dtype(dtype) if dtype == "bfloat16" else dtype
            return self.xp.from_array(values.astype(dtype), chunks=tuple(max(1, -(-n // 2)) for n in values.shape))
        if self.library == "cupy" and dtype != "bfloat16":  # CuPy would take what becomes subnormal for 0
            with np.errstate(all="ignore"):
                return self.xp.asarray(values.astype(dtype))
        if self.library == "mlx":  # which makes float32 of NumPy's float64, and keeps no long double
            return self.xp.array(values.astype(np.float32 if dtype == "bfloat16" else dtype), self.dtype(dtype))
        if self.library in ("plain", "sparse", "cubed", "ndonnx"):
            return self.xp.asarray(np.ascontiguousarray(values.astype(dtype)).reshape(values.shape))
        if self.library in ("numpy", "cupy", "autograd"):
            return self.xp.asarray(values).astype(self.dtype(dtype))
        if self.library == "strict":
            values = values.astype(dtype)  # a device without float64 takes no array of it, not even to cast it
        return self.xp.asarray(values, dtype=self.dtype(dtype), device=self.device)

    def check(self, actual: Any, expected: Any, *, dtype: str | None = None, tolerance: float | None = None) -> None:
        """Assert library, device, dtype, shape and, to an absolute and relative tolerance, the numbers."""
        desired, tolerance = self.array(expected, dtype), self.tolerance if tolerance is None else tolerance
        if self.library == "torch":
            assert actual.requires_grad <= self.tracked
            actual, desired = actual.detach(), desired.detach()
        if self.library in OTHERS:
            assert (type(actual), actual.dtype, tuple(actual.shape)) == (type(desired), desired.dtype, desired.shape)
            actual, desired = self.numpy(actual), self.numpy(desired)
        if dtype == "bfloat16":  # foreign to NumPy, which the comparison is made in
            assert actual.dtype == desired.dtype
            actual, desired = (x.float() if self.library == "torch" else x.astype("float32") for x in (actual, desired))
        with np.errstate(all="ignore"):  # Dask computes only now
            assert_close(actual, desired, rtol=tolerance, atol=tolerance)

    def numpy(self, array: Any) -> Any:
        """The array's numbers in NumPy, in float64."""
        if self.library == "torch":
            return array.detach().cpu().double().numpy()
        if self.library == "dask":
            with np.errstate(all="ignore"):
                array = array.compute()
        if self.library == "cupy":
            array = array.get()
        if self.library == "mlx":
            array = np.array(array.astype(self.xp.float32) if array.dtype == self.xp.bfloat16 else array)
        if self.library in ("plain", "sparse", "cubed", "ndonnx"):
            names = {"plain": "to_numpy", "sparse": "todense", "cubed": "compute", "ndonnx": "unwrap_numpy"}
            array = getattr(array, names[self.library], lambda: array)()
        if self.library == "strict":
            array = array.to_device(self.xp.Device("CPU_DEVICE"))
        return np.asarray(array).astype(np.float64)


OTHERS = ("plain", "sparse", "cubed", "ndonnx", "mlx", "autograd")
"""Those of which the conformance suite, and the tests of their own, are all that runs."""


def backends(cell: Cell) -> list[Backend]:
    """The backends of a cell, one for each device; `Missing` if there is none."""
    try:
        found = _MAKE[cell.library](cell)
    except ImportError as error:
        raise Missing(f"cell {cell.id} cannot run: {error}") from error
    if not found:
        raise Missing(f"cell {cell.id} cannot run: {cell.library} finds no {cell.device} device")
    return found


def drawn(items, of, step=1, own=1):
    """One in `step` of the cases of each test, each on the next backend, or executor; and what is left out.

    Of tests of one case, if not all cases are to run, one in two, or in half of `step` if that is more. Of tests that
    are about one library one in `own`.
    """
    tests = {}
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        about_one = of not in given or any(len(marker.args) == 1 for marker in item.iter_markers("cells"))
        test = tests.setdefault(item.nodeid.partition("[")[0], (own if about_one else step, defaultdict(list)))
        test[1][item.name.replace(repr(given.get(of)), "")].append(item)
    left, single = set(), 0
    for by, cases in tests.values():
        if len(cases) == 1:
            single += by > 1
            left.update(*cases.values() if by > 1 and single % max(2, by // 2) else ())
            continue
        for i, case in enumerate(cases.values()):
            keep = case[i // by % len(case)] if i % by == 0 else None
            left.update(item for item in case if item is not keep)
    return [item for item in items if item not in left], [item for item in items if item in left]


def two_devices(backend: Backend) -> list[Any]:
    """One of array-api-strict's devices, and one without 64 bits: most tests run on these alone."""
    return [backend.xp.Device(name) for name in ("device1", "no_x64")]


def _numpy(cell: Cell) -> list[Backend]:
    return [Backend("numpy", np, "cpu")]


def _strict(cell: Cell) -> list[Backend]:
    import array_api_strict as xp

    xp.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=())
    devices = xp.__array_namespace_info__().devices()
    names = [str(device).partition("'")[2].partition("'")[0] for device in devices]
    return [
        Backend("strict", xp, device, float64=name not in ("no_float64", "no_x64"))
        for device, name in zip(devices, names, strict=True)
    ]


def _torch(cell: Cell) -> list[Backend]:
    import torch

    if cell.device == "cuda" and not torch.cuda.is_available():
        return []
    device = torch.device("cuda", 0) if cell.device == "cuda" else torch.device("cpu")
    return [Backend("torch", torch, device), Backend("torch", torch, device, tracked=True)]


def _fast(cell: Cell) -> list[Backend]:
    import_module("numba")
    return _numpy(cell) + _torch(cell)


def _frameworks(cell: Cell) -> list[Backend]:
    os.environ["KERAS_BACKEND"] = "jax"
    for name in ("flax", "haiku", "equinox", "keras", "mlx"):
        import_module(name)
    return _numpy(cell)


def _jax(cell: Cell) -> list[Backend]:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    return [Backend("jax", jax.numpy, jax.devices()[1])]


def _dask(cell: Cell) -> list[Backend]:
    import dask.array

    dask.config.set(scheduler="synchronous")  # for arrays this small threads cost more than they do
    return [Backend("dask", dask.array, "cpu")]


def _cupy(cell: Cell) -> list[Backend]:
    import cupy

    if not cupy.cuda.is_available():
        return []
    return [Backend("cupy", cupy, cupy.cuda.Device(0))]


def _mlx(cell: Cell) -> list[Backend]:
    import mlx.core

    mlx.core.set_default_device(mlx.core.cpu)
    return [Backend("mlx", mlx.core, "cpu", float64=True)]


def _ndonnx(cell: Cell) -> list[Backend]:
    return [Backend("ndonnx", import_module("ndonnx"), "cpu")]


def _others(cell: Cell) -> list[Backend]:
    """`plain` is a library of the tests' own."""
    names = {"plain": "plain", "sparse": "sparse", "cubed": "cubed.array_api", "autograd": "autograd.numpy"}
    return [Backend(name, import_module(module), "cpu") for name, module in names.items()]


_MAKE = {
    **{"numpy": _numpy, "strict": _strict, "torch": _torch, "fast": _fast, "jax": _jax, "dask": _dask, "cupy": _cupy},
    **{"mlx": _mlx, "ndonnx": _ndonnx, "others": _others, "frameworks": _frameworks},
}
