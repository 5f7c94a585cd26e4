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

    every: int = 1
    """One in so many of the cases of each test is run, as NumPy's cell runs them all: `--every=1` runs all here too."""

    @property
    def id(self) -> str:
        return f"{self.library}-{self.device}"

    @property
    def tags(self) -> list[str]:
        return ["cuda"] if self.device == "cuda" else []


CELLS = (
    Cell("numpy", "cpu", ("test", "oracle")),
    Cell("strict", "cpu", ("test", "oracle", "strict"), every=2),
    Cell("torch", "cpu", ("test", "oracle", "torch"), every=2),
    Cell("fast", "cpu", ("test", "oracle", "torch", "fast"), ("numpy", "torch"), every=5),
    Cell("jax", "cpu", ("test", "oracle", "jax"), every=16),
    Cell("dask", "cpu", ("test", "dask"), every=3),
    Cell("frameworks", "cpu", ("test", "frameworks")),
    Cell("mlx", "cpu", ("test", "mlx")),
    Cell("ndonnx", "cpu", ("test", "ndonnx")),
    Cell("others", "cpu", ("test", "others"), every=2),
    Cell("torch", "cuda", ("test", "oracle", "torch")),
    Cell("cupy", "cuda", ("test", "cupy")),
)
