"""A kind of device: arrays of each library on it, when they are done, and the memory that they take."""

import ctypes
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from formula import Array, Arrays
from works import Work

TITLES = {"numpy": "NumPy", "torch": "PyTorch", "jax": "JAX", "cupy": "CuPy"}
Run = Callable[[], tuple[Array, ...]]


class MissingError(Exception):
    """What is asked for cannot be measured here."""


class Cpu:
    """The processor, and all of its cores."""

    name = "cpu"
    libraries = ("numpy", "torch", "jax")
    dtypes = ("float32", "float64", "bfloat16")
    reference = np
    """The namespace of the float64 arrays that results are compared with."""

    def __init__(self) -> None:
        # a GPU that is there is not to be measured, nor to be filled
        os.environ["JAX_PLATFORMS"] = "cpu"

    def numbers(self, work: Work, dtype: str) -> Arrays:
        """What the work is given, in NumPy and this dtype."""
        kind = import_module("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
        return random_arrays(work, kind)

    def arrays(self, library: str, numbers: Arrays) -> Arrays | None:
        """The same numbers as arrays of a library; None where it has no such dtype."""
        if library == "jax":  # where it is told to have float64, the other dtypes are not computed as by default
            return None if numbers.x.dtype == np.float64 else _each(import_module("jax.numpy").asarray, numbers)
        if library == "numpy":
            return numbers
        torch = import_module("torch")

        def convert(each: Array) -> Array:
            if each.dtype.name != "bfloat16":
                return torch.from_numpy(each)
            return torch.from_numpy(each.view(np.int16)).view(torch.bfloat16)

        return _each(convert, numbers)

    def widen(self, library: str, array: Array) -> Array:
        """An array of a library in float64 of the reference."""
        return array.detach().double().numpy() if library == "torch" else np.asarray(array).astype(np.float64)

    def wait(self, library: str, results: tuple[Array, ...]) -> None:
        """Until the results are computed."""
        if library == "jax":
            import_module("jax").block_until_ready(results)

    def extra_memory(self, run: Run) -> int | None:
        """How much the memory in use grows at most while it runs, in bytes; None where the system does not say."""
        if not _reset_peak():
            return None
        before = _status("VmRSS")
        results = run()
        after = _status("VmHWM")
        del results
        return max(0, after - before)

    def describe(self) -> str:
        """The processor."""
        names = re.findall(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
        name = (names or [platform.processor() or platform.machine()])[0]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"{name}, {cores} cores"


class Cuda:
    """The first GPU of NVIDIA."""

    name = "cuda"
    libraries = ("torch", "jax", "cupy")
    dtypes = ("float32", "bfloat16", "float16")

    def __init__(self) -> None:
        # several libraries share the GPU, and none may take most of it in advance
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        try:
            self.reference = import_module("torch")
        except ImportError as error:
            raise MissingError(f"--device cuda needs PyTorch, to compare results in: {error}") from None
        if not self.reference.cuda.is_available():
            raise MissingError("--device cuda needs a GPU, and PyTorch finds none")

    def numbers(self, work: Work, dtype: str) -> Arrays:
        """What the work is given, in PyTorch and this dtype."""
        torch = self.reference
        generator = torch.Generator("cuda").manual_seed(0)
        return _fill(
            work,
            lambda shape: torch.randn(shape, generator=generator, device="cuda"),
            lambda array: array.to(getattr(torch, dtype)),
        )

    def arrays(self, library: str, numbers: Arrays) -> Arrays:
        """The same numbers as arrays of a library."""
        if library == "torch":
            return numbers
        dtype = str(numbers.x.dtype).removeprefix("torch.")
        if library == "cupy":
            dtype = getattr(import_module("ml_dtypes"), dtype) if dtype == "bfloat16" else dtype
        xp = import_module("jax.numpy" if library == "jax" else "cupy")
        # through float32, which every library exchanges
        converted = _each(lambda each: xp.from_dlpack(each.float()).astype(dtype), numbers._replace(weights=None))
        return converted if numbers.weights is None else converted._replace(weights=xp.from_dlpack(numbers.weights))

    def widen(self, library: str, array: Array) -> Array:
        """An array of a library in float64 of the reference."""
        if library != "torch":
            array = self.reference.from_dlpack(array.astype("float32"))
        return array.detach().double()

    def wait(self, library: str, results: tuple[Array, ...]) -> None:
        """Until the GPU is done."""
        if library == "jax":
            import_module("jax").block_until_ready(results)
        self.reference.cuda.synchronize()

    def extra_memory(self, run: Run) -> int | None:
        """How much the memory that PyTorch and CuPy have in use grows at most while it runs, in bytes."""
        cuda = self.reference.cuda
        cuda.synchronize()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        with _cupy_peak() as cupy_peak:
            results = run()
            cuda.synchronize()
        grown = cuda.max_memory_allocated() - before + cupy_peak[0]
        del results
        return int(grown)

    def describe(self) -> str:
        """The GPU."""
        return str(self.reference.cuda.get_device_name())


DEVICES: dict[str, type[Cpu | Cuda]] = {"cpu": Cpu, "cuda": Cuda}
Device = Cpu | Cuda


def machine(device: Device) -> dict[str, str]:
    """The processor, and the version of each library that is installed."""
    found = {"processor": device.describe(), "Python": platform.python_version()}
    for library in ("numpy", "torch", "jax", *(["numba"] if device.name == "cpu" else [])):
        if library_version := _version(library):
            found[TITLES.get(library, library)] = library_version
    if device.name == "cuda":
        for distribution in ("cupy-cuda13x", "cupy-cuda12x", "cupy"):
            if library_version := _version(distribution):
                found.setdefault(TITLES["cupy"], library_version)
    return found


def random_arrays(work: Work, dtype: Any = "float32") -> Arrays:
    """Normal numbers of NumPy, the same in every run."""
    rng = np.random.default_rng(0)
    return _fill(
        work,
        lambda shape: rng.standard_normal(shape, dtype=np.float32),
        lambda array: array.astype(dtype, copy=False),
    )


def _fill(work: Work, normal: Callable[[tuple[int, ...]], Array], to_dtype: Callable[[Array], Array]) -> Arrays:
    shape = work.parameter_shape
    numbers = Arrays(
        x=normal(work.shape),
        gamma=normal(shape),
        beta=normal(shape),
        mean=normal(shape),
        var=abs(normal(shape)) + 0.5,
        dy=normal(work.shape if work.gradient else (1,)) + work.dy_mean,
    )
    return _each(to_dtype, numbers)._replace(weights=normal(work.shape) > 0 if work.masked else None)


def _each(convert: Callable[[Array], Array], arrays: Arrays) -> Arrays:
    return Arrays(*(None if array is None else convert(array) for array in arrays))


def _reset_peak() -> bool:
    """Set the peak of the memory in use to what is in use; False where Linux does not, or where it is not Linux."""
    try:
        # what was freed and kept is given back, else it would be taken again unseen
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return False
    return True


def _status(field: str) -> int:
    """A field of the process's status, in bytes."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", _text("/proc/self/status"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


@contextmanager
def _cupy_peak() -> Iterator[list[int]]:
    """The peak of what CuPy's pool hands out, beyond what it has handed out before."""
    peak = [0]
    try:
        cupy = import_module("cupy")
    except ImportError:
        yield peak
        return

    class Peak(cupy.cuda.MemoryHook):
        name = "peak"
        used = 0

        def malloc_postprocess(self, *, mem_size: int, **_: Any) -> None:
            self.used += mem_size
            peak[0] = max(peak[0], self.used)

        def free_postprocess(self, *, mem_size: int, **_: Any) -> None:
            self.used -= mem_size

    with Peak():
        yield peak


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except ImportError:  # of which PackageNotFoundError is one
        return None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
