"""The house itself: what may import what, and what importing the package loads."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import anynorm

pytestmark = pytest.mark.cells("numpy")

PACKAGE = Path(anynorm.__file__).parent
FLOORS = ["kernels", "weights", "replicas", "library", "of_numpy", "of_torch", "of_jax", "of_cupy", "arrays"]
FLOORS += ["keywords", "settings", "layouts", "files", "counts", "statistics", "blocks"]
FLOORS += [
    "calls",
    "passes",
    *(f"executors.programs.{name}" for name in ("trace", "cuda", "cuda_run", "compiled", "cpu", "cpu_run", "run")),
    "executors.programs",
    "schedules",
    "pullbacks",
    "graphs",
    "chunks",
    "autograd",
    "batches",
    "norms",
]
FLOORS += ["state", "gradients"]
LIBRARIES = {"numpy", "array_api_compat", "torch", "jax", "cupy", "dask", "array_api_strict", "array_api_extra"}


def imports(room):
    """The modules that a room imports anywhere in its text."""
    found, path = set(), PACKAGE.joinpath(*room.split("."))
    for node in ast.walk(ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = PACKAGE.parent.joinpath(*node.module.split(".")).is_dir()  # a package, whose modules are named
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if inside else {node.module}
    return found


@pytest.mark.parametrize("room", FLOORS)
def test_nothing_imports_upward(room):
    below = set(FLOORS[: FLOORS.index(room)])
    own = {name.removeprefix("anynorm.") for name in imports(room) if name.startswith("anynorm.")}
    # what a package offers is named with it
    assert {name if name in FLOORS else name.rpartition(".")[0] for name in own} <= below


COMPILED = "executors.programs.compiled"
DOOR = ["library", "of_numpy", "of_torch", "of_jax", "of_cupy", "arrays"]


@pytest.mark.parametrize("room", [floor for floor in FLOORS if floor not in (*DOOR, "files", COMPILED)])
def test_only_the_door_imports_an_array_library(room):
    assert not {name.split(".")[0] for name in imports(room)} & LIBRARIES


def test_numba_is_imported_in_one_place_and_not_before_it_is_wanted():
    found = {room for room in FLOORS if {name.split(".")[0] for name in imports(room)} & {"numba", "llvmlite"}}
    assert found == {COMPILED}
    tree = ast.parse(PACKAGE.joinpath(*COMPILED.split(".")).with_suffix(".py").read_text())
    assert not {each.names[0].name.split(".")[0] for each in tree.body if isinstance(each, ast.Import)} & {"numba"}


@pytest.mark.parametrize("room", DOOR)
def test_the_door_imports_numpy_and_array_api_compat_alone(room):
    found = {name.split(".")[0] for name in imports(room)} & LIBRARIES
    assert found <= ({"numpy", "array_api_compat"} if room == "arrays" else {"numpy"})


def test_the_files_import_numpy_for_its_own_format():
    assert {name.split(".")[0] for name in imports("files")} & LIBRARIES == {"numpy"}
    tree = ast.parse((PACKAGE / "files.py").read_text())
    uses = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "np"}
    assert uses == {"savez", "lib", "ndarray", "frombuffer", "uint8"}, "arrays come and go through the door"


def test_the_kernels_name_no_library():
    tree = ast.parse((PACKAGE / "kernels.py").read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & LIBRARIES
    assert imports("kernels") <= {"collections.abc", "functools", "math", "operator", "sys", "typing"}


@pytest.mark.parametrize("module", ["anynorm", "anynorm.cli"])
def test_importing_loads_no_optional_library(module):
    optional = ["torch", "jax", "cupy", "dask", "array_api_strict", "array_api_extra", "safetensors", "rich"]
    optional += ["matplotlib", "sklearn", "ml_dtypes", "hypothesis", "pytest", "numba", "llvmlite"]
    code = f"import sys, {module}; print([name for name in {optional} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_signatures_are_those_of_the_design():
    common = "x, /, gamma=None, beta=None, *, "
    expected = {
        "normalize": common + "axis, eps=1e-05, weights=None, moments=None, return_moments=False, out=None",
        "layer_norm": common + "axis=-1, eps=1e-05, weights=None, return_moments=False, out=None",
        "batch_norm": common
        + "channel_axis=1, eps=1e-05, weights=None, moments=None, return_moments=False, out=None, all_reduce=None",
        "instance_norm": common + "channel_axis=1, eps=1e-05, weights=None, return_moments=False, out=None",
        "group_norm": common + "groups, channel_axis=1, eps=1e-05, weights=None, return_moments=False, out=None",
        "rms_norm": common + "axis=-1, eps=1e-05, weights=None, out=None",
        "weight_norm": "v, g, /, *, axis=0, out=None",
        "moments": "x, /, *, axis, weights=None",
        "vjp": "norm, x, /, *params, **options",
        "save": "states, path",
        "load": "path, like=None",
        "options": "*, engine=None, threads=None, block_bytes=None",
        "RunningStats": "mean, var, count=0, *, momentum=0.9, correction=0",
        "WeightNorm": "v, g, *, axis=0",
        "Moments": "mean, var, count",
    }
    assert set(expected) == set(anynorm.__all__)
    for name, text in expected.items():
        signature = inspect.signature(getattr(anynorm, name))
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == f"({text})"


@pytest.mark.parametrize("name", anynorm.__all__)
def test_everything_public_is_documented_with_an_example(name):
    thing = getattr(anynorm, name)
    sections = ["Raises", "Examples", ">>> "]
    sections += ["Parameters"] + (["Returns"] if inspect.isfunction(thing) else [])
    sections += ["References"] if inspect.isfunction(thing) and thing is not anynorm.options else []
    for section in sections:
        assert section in inspect.getdoc(thing)
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            if not member.startswith("_") and callable(getattr(value, "__func__", value)):
                assert "Returns" in inspect.getdoc(value), member
