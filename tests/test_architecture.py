"""The house itself: what may import what, and what importing the package loads."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from inner import moves

import anynorm

pytestmark = pytest.mark.cells("numpy")

PACKAGE = Path(anynorm.__file__).parent
FLOORS = (
    {"kernels"},
    {"arrays"},
    {"keywords"},
    {"settings", "files"},
    {"values"},
    {"statistics"},
    {"calls"},
    {"executors.threads", "executors.parameters"},
    {"executors.whole", "executors.programs", "executors.blocks"},
    {"executors.eager"},
    {"executors.dask"},
    {"executors.torch_autograd"},
    {"executors"},
    {"batches", "folding"},
    {"norms"},
    {"gradients", "state", "weight"},
    {"saving", "dialects"},
    {"checkpoints"},
)
"""Modules and packages; each imports from those before it, and within its own package."""
LIBRARIES = {"numpy", "array_api_compat", "torch", "jax", "cupy", "dask", "array_api_strict", "array_api_extra"}
COMMAND_LINE = ("__main__", "cli", "info", "demo")


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = sorted(name_of(path) for path in PACKAGE.rglob("*.py"))
BUILT = [name for name in MODULES if name and not name.startswith(COMMAND_LINE)]


def text_of(module):
    path = PACKAGE.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def imports(module):
    """The modules that a module imports anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(text_of(module))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:  # a module, or what one holds
                inner = f"{node.module}.{alias.name}".removeprefix("anynorm.")
                found.add(f"anynorm.{inner}" if node.module.startswith("anynorm") and inner in MODULES else node.module)
    return found


def own_imports(module):
    return {name.removeprefix("anynorm.") for name in imports(module) if name.startswith("anynorm.")}


def floor(module):
    """The number of its floor, and which of those there it belongs to."""
    found = [
        (i, name)
        for i, names in enumerate(FLOORS)
        for name in names
        if module == name or (name != "executors" and module.startswith(f"{name}."))
    ]
    assert len(found) == 1, module
    return found[0]


@pytest.mark.parametrize("module", BUILT)
def test_nothing_imports_upward_or_beside(module):
    mine = floor(module)
    for other in own_imports(module):
        theirs = floor(other)
        assert theirs == mine or theirs[0] < mine[0], other


def test_no_module_imports_itself_by_way_of_others():
    left = {module: own_imports(module) - {module} for module in BUILT}
    for module, others in left.items():  # a package's own list of names is read last
        if any(name.startswith(f"{module}.") for name in BUILT):
            left[module] = set()
        left[module] = {other for other in others if other in left} if left[module] else set()
    while free := [module for module, others in left.items() if not others]:
        for module in free:
            del left[module]
        left = {module: others - set(free) for module, others in left.items()}
    assert not left


COMPILED = "executors.programs.compiled"


@pytest.mark.parametrize("module", [name for name in BUILT if floor(name)[1] not in ("arrays", "files")])
def test_array_libraries_are_imported_in_arrays_alone(module):
    assert not {name.split(".")[0] for name in imports(module)} & LIBRARIES or module == COMPILED


def test_numba_is_imported_in_one_place_and_not_before_it_is_wanted():
    found = {module for module in BUILT if {name.split(".")[0] for name in imports(module)} & {"numba", "llvmlite"}}
    assert found == {COMPILED}
    tree = ast.parse(text_of(COMPILED))
    assert not {each.names[0].name.split(".")[0] for each in tree.body if isinstance(each, ast.Import)} & {"numba"}


@pytest.mark.parametrize("module", [name for name in BUILT if floor(name)[1] == "arrays"])
def test_arrays_import_numpy_and_array_api_compat_alone(module):
    found = {name.split(".")[0] for name in imports(module)} & LIBRARIES
    assert found <= {"numpy", "array_api_compat"}


def test_the_files_import_numpy_for_its_own_format():
    assert {name.split(".")[0] for name in imports("files")} & LIBRARIES == {"numpy"}
    tree = ast.parse(text_of("files"))
    uses = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "np"}
    assert uses == {"savez", "lib", "frombuffer", "uint8"}, "arrays come and go by way of `arrays`"


@pytest.mark.parametrize("module", [name for name in BUILT if floor(name)[1] == "kernels"])
def test_the_kernels_name_no_library(module):
    names = {node.id for node in ast.walk(ast.parse(text_of(module))) if isinstance(node, ast.Name)}
    assert not names & LIBRARIES
    others = {name for name in imports(module) if not name.startswith("anynorm")}
    assert others <= {"collections.abc", "functools", "math", "operator", "sys", "typing"}


def test_only_the_one_choice_names_more_than_one_executor():
    executors = {"executors.whole", "executors.programs", "executors.blocks"}
    for module in BUILT:
        found = {name for name in executors for other in own_imports(module) if f"{other}.".startswith(f"{name}.")}
        found -= {floor(module)[1]}
        assert len(found) < 2 or module == "executors.eager", module


def test_what_is_private_looks_private():
    assert [name for name in dir(anynorm) if not name.startswith("_")] == sorted(anynorm.__all__)


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
        "denormalize": "y, /, gamma=None, beta=None, *, axis, moments, eps=1e-05, out=None",
        "layer_norm": common + "axis=-1, eps=1e-05, weights=None, moments=None, return_moments=False, out=None",
        "batch_norm": common
        + "channel_axis=1, eps=1e-05, weights=None, moments=None, return_moments=False, out=None, all_reduce=None",
        "instance_norm": common
        + "channel_axis=1, eps=1e-05, weights=None, moments=None, return_moments=False, out=None",
        "group_norm": common
        + "groups, channel_axis=1, eps=1e-05, weights=None, moments=None, return_moments=False, out=None",
        "rms_norm": common + "axis=-1, eps=1e-05, weights=None, out=None",
        "center": "x, /, beta=None, *, axis, weights=None, moments=None, return_moments=False, "
        + "all_reduce=None, out=None",
        "weight_norm": "v, g, /, *, axis=0, out=None",
        "moments": "x, /, *, axis, weights=None, dtype=None",
        "fold": "w, b, gamma, beta, /, *, moments, eps=1e-05, axis=0, in_axis=None, groups=1",
        "fold_next": "w, b, gamma, beta, /, *, moments=None, eps=1e-05, axis=1, out_axis=0, groups=1",
        "from_checkpoint": "state, name='', *, dialect, zero_centred=False, eps=None, momentum=None",
        "to_checkpoint": "params, name, *, dialect",
        "NormParams": "gamma=None, beta=None, running=None, weight=None, eps=1e-05, *, zero_centred=False, source=None",
        "vjp": "norm, x, /, *params, **options",
        "save": "states, path",
        "load": "path, like=None",
        "options": "*, engine=None, threads=None, block_bytes=None",
        "RunningStats": "mean, var, count=0, *, momentum=0.9, correction=0, debias=False",
        "WeightNorm": "v, g, *, axis=0",
        "Moments": "mean, var, count",
    }
    assert set(expected) == set(anynorm.__all__)
    for name, text in expected.items():
        signature = inspect.signature(getattr(anynorm, name))
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == f"({text})"


def test_everything_public_has_a_page_of_its_own():
    summary = (PACKAGE.parent / "docs" / "api.md").read_text()
    tables = re.findall(r"^\.\. autosummary::\n   :toctree: api\n(.*?)^```", summary, re.MULTILINE | re.DOTALL)
    assert sorted(re.findall(r"^   (\w+)$", "".join(tables), re.MULTILINE)) == sorted(anynorm.__all__)


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


@pytest.mark.cells("numpy", "fast")
@pytest.mark.parametrize(("engine", "forward", "backward"), [("numba", 24, 18), ("arrays", 56, 98)])
def test_a_warm_call_makes_few_moves_between_modules(engine, forward, backward):
    if engine == "numba":
        pytest.importorskip("numba", reason="the cell of NumPy alone has no programs")
    x, gamma = np.ones((512, 1024), np.float32), np.ones(1024, np.float32)
    with anynorm.options(engine=engine, threads=1):
        y, pullback = anynorm.vjp(anynorm.layer_norm, x, gamma, gamma)
        assert moves(lambda: anynorm.layer_norm(x, gamma, gamma)) <= forward
        assert moves(lambda: pullback(y)) <= backward
