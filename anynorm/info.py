"""`anynorm info`: the array libraries found, their devices, the float dtypes that work, and the engine."""

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import anynorm
from anynorm.arrays.recognize import library_of
from anynorm.executors.programs import compiled
from anynorm.kernels import Array, Namespace
from anynorm.settings import current

FLOATS = ("float16", "bfloat16", "float32", "float64")


class Library(NamedTuple):
    """How to import an array library, which devices it has, and how to put a NumPy array on one of them."""

    module: str
    devices: Callable[[Any], dict[str, Any]]
    """From the module, its devices by name, the one it takes by itself first."""
    place: Callable[[Any, Any, Any], Array]
    """From the module, a NumPy array and a device, the array on the device."""


def run() -> None:
    """Print the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"anynorm {anynorm.__version__}", style="bold")
    table = Table(box=box.ROUNDED)
    for column in ("library", "device", "float dtypes that work"):
        table.add_column(column)
    for name in LIBRARIES:
        for row in _rows(name):
            table.add_row(*row)
    console.print(table)
    for line in _engine():
        console.print(line, soft_wrap=True)


def _engine() -> list[str]:
    """What computes large arrays of NumPy and of PyTorch on a processor, and where it keeps what it compiled."""
    version, why = compiled.state()
    asked = current().engine
    if asked == "arrays":
        return ["engine: array operations, as ANYNORM_ENGINE says"]
    if version is None:
        return [f"engine: array operations; numba {why}"]
    folder = compiled.cache_folder()
    calls = "calls of every size" if asked == "numba" else "calls of 1 MiB and more"
    return [
        f"engine: numba {version} for {calls}, on up to {current().threads} threads",
        f"compiled loops are kept in {folder}"
        if folder
        else "compiled loops are kept in memory: no folder is writeable",
    ]


def is_installed(package: str) -> bool:
    """Whether a package is there, without importing it."""
    return importlib.util.find_spec(package) is not None


def import_library(name: str) -> Any:
    """The module of a library that is installed.

    Raises
    ------
    ImportError
        If it does not import, for whichever reason.
    """
    try:
        return importlib.import_module(LIBRARIES[name].module)
    except Exception as error:  # a broken installation can raise anything
        raise ImportError(f"{name} is installed but does not import: {_first_line(error)}") from error


def _rows(name: str) -> list[tuple[str, str, str]]:
    """A row for each device."""
    if not is_installed(name):
        return [(name, "not installed", "")]
    title = f"{name} {_version(name)}"
    try:
        module = import_library(name)
        devices = LIBRARIES[name].devices(module)
    except Exception as error:
        return [(title, "broken", _first_line(error.__cause__ or error))]
    if not devices:
        return [(title, "none", "")]
    rows: list[tuple[str, str, str]] = []
    for device, handle in devices.items():
        working = ", ".join(dtype for dtype in FLOATS if _works(name, module, handle, dtype))
        rows.append(("" if rows else title, device, working or "none"))
    return rows


def _version(name: str) -> str:
    """The version of the distribution, which is not always named as the package is."""
    for distribution in importlib.metadata.packages_distributions().get(name, ()):
        return importlib.metadata.version(distribution)
    return "unknown"


def _works(name: str, module: Any, device: Any, dtype: str) -> bool:
    """Whether layer normalization of an array of this dtype gives the right numbers in the same dtype."""
    try:
        with warnings.catch_warnings(action="ignore"):
            x = LIBRARIES[name].place(module, np.asarray([[1.0, 3.0], [5.0, 25.0]], dtype=np.float32), device)
            xp = library_of("x", x).xp
            y = anynorm.layer_norm(xp.astype(x, _dtype(xp, dtype)))
            right = all(abs(float(y[row, column]) - (2 * column - 1)) < 1e-2 for row in range(2) for column in range(2))
    except Exception:  # each library has its own for a dtype that it does not know
        return False
    return right and str(y.dtype).rpartition(".")[2] == dtype


def _dtype(xp: Namespace, name: str) -> Any:
    """The library's own dtype, NumPy's, or the one that ml_dtypes lends to both."""
    for namespace in (xp, np):
        if hasattr(namespace, name):
            return getattr(namespace, name)
    return getattr(importlib.import_module("ml_dtypes"), name)


def _torch_devices(torch: Any) -> dict[str, Any]:
    names = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        names += [f"{kind}:{ordinal}" for ordinal in range(torch.accelerator.device_count())]
    return {name: torch.device(name) for name in names}


def _jax_devices(jax: Any) -> dict[str, Any]:
    return {f"{device.platform}:{device.id}": device for device in (*jax.devices(), *jax.devices("cpu"))}


def _cupy_devices(cupy: Any) -> dict[str, Any]:
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:  # neither a driver nor a GPU
        return {}
    return {f"cuda:{ordinal}": cupy.cuda.Device(ordinal) for ordinal in range(count)}


def _cupy_place(cupy: Any, x: Any, device: Any) -> Array:
    device.use()  # CuPy makes new arrays on the device in use, wherever the old ones are
    return cupy.asarray(x)


def _strict_devices(strict: Any) -> dict[str, Any]:
    return {str(device).split("'")[1]: device for device in strict.__array_namespace_info__().devices()}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


LIBRARIES = {
    "numpy": Library("numpy", lambda _: {"cpu": None}, lambda _np, x, _cpu: x),
    "torch": Library("torch", _torch_devices, lambda torch, x, device: torch.asarray(x, device=device)),
    "jax": Library("jax", _jax_devices, lambda jax, x, device: jax.numpy.asarray(x, device=device)),
    "cupy": Library("cupy", _cupy_devices, _cupy_place),
    "mlx": Library("mlx.core", lambda _: {"cpu": None}, lambda mlx, x, _cpu: mlx.array(x)),
    "ndonnx": Library("ndonnx", lambda _: {"cpu": None}, lambda ndonnx, x, _cpu: ndonnx.asarray(x)),
    "sparse": Library("sparse", lambda _: {"cpu": None}, lambda sparse, x, _cpu: sparse.asarray(x)),
    "cubed": Library("cubed.array_api", lambda _: {"cpu": None}, lambda cubed, x, _cpu: cubed.asarray(x)),
    "dask": Library("dask.array", lambda _: {"cpu": None}, lambda dask, x, _cpu: dask.asarray(x)),
    "array_api_strict": Library(
        "array_api_strict", _strict_devices, lambda strict, x, device: strict.asarray(x, device=device)
    ),
}
