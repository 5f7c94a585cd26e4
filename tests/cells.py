"""The one table of what is tested where: read by noxfile.py, by conftest.py and by the documentation."""

from typing import NamedTuple


class Cell(NamedTuple):
    """A library on a kind of device."""

    library: str
    device: str
    groups: tuple[str, ...]
    """The dependency groups of pyproject.toml to install; none where the interpreter must bring its own packages."""

    libraries: tuple[str, ...] = ()
    """Those whose tests run, unless it is the one that the cell is named for."""

    @property
    def id(self) -> str:
        return f"{self.library}-{self.device}"

    @property
    def tags(self) -> list[str]:
        return ["cuda"] if self.device == "cuda" else []


CELLS = (
    Cell("numpy", "cpu", ("test", "oracle")),
    Cell("strict", "cpu", ("test", "oracle", "strict")),
    Cell("torch", "cpu", ("test", "oracle", "torch")),
    Cell("fast", "cpu", ("test", "oracle", "torch", "fast"), ("numpy", "torch")),
    Cell("jax", "cpu", ("test", "oracle", "jax")),
    Cell("dask", "cpu", ("test", "dask")),
    Cell("frameworks", "cpu", ("test", "frameworks")),
    Cell("mlx", "cpu", ("test", "mlx")),
    Cell("ndonnx", "cpu", ("test", "ndonnx")),
    Cell("others", "cpu", ("test", "others")),
    Cell("torch", "cuda", ("test", "oracle", "torch")),
    Cell("cupy", "cuda", ("test", "cupy")),
)
