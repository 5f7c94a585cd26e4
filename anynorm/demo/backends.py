"""The array library that the demonstration runs on, and all that it must know to tell one from another."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from anynorm.arrays.recognize import library_of
from anynorm.executors.programs import compiled
from anynorm.info import LIBRARIES, import_library, is_installed
from anynorm.kernels import Array, Namespace
from anynorm.settings import current

BACKENDS = ("numpy", "torch", "cupy", "jax")


@dataclass(frozen=True)
class Backend:
    """An array library and one of its devices."""

    name: str
    device: str
    xp: Namespace
    to_array: Callable[[Any], Array]
    """A NumPy array, on the device and of its own dtype."""
    compile: Callable[[Callable[..., Any]], Callable[..., Any]]
    """What makes a pure function fast; most libraries need nothing."""
    engine: str
    """For `anynorm.options`: calls as small as these are programs too, where there are any."""


def open_backend(name: str, device: str | None) -> Backend:
    """The array library `name` on `device`, by default its first.

    Raises
    ------
    ImportError
        If the library is not installed, or does not import.
    ValueError
        If it has no such device.
    """
    if not is_installed(name):
        package = {"cupy": "cupy-cuda13x"}.get(name, name)
        raise ImportError(f"install {name} first: pip install {package}")
    module = import_library(name)
    devices = LIBRARIES[name].devices(module)
    if not devices:
        raise ValueError(f"{name} finds no device here")
    found = next(iter(devices)) if device is None else _find(device, list(devices), name)

    programs = current().engine == "auto" and compiled.state().version is not None
    programs = programs and name in ("numpy", "torch") and found == "cpu"

    def to_array(x: Any) -> Array:
        return LIBRARIES[name].place(module, np.asarray(x), devices[found])

    return Backend(
        name=name,
        device=found,
        xp=library_of("x", to_array(np.zeros(1))).xp,
        to_array=to_array,
        compile=module.jit if name == "jax" else lambda function: function,
        engine="numba" if programs else current().engine,
    )


def _find(device: str, names: list[str], library: str) -> str:
    """The device that is meant: cuda:0 also by cuda and by 0."""
    for name in (device, f"{device}:0", f"cuda:{device}"):
        if name in names:
            return name
    raise ValueError(f"--device must be one of {', '.join(names)} for {library}, got {device}")
