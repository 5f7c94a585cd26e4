"""Everything that is checked, a session each: `nox` runs what needs no GPU, `nox --no-venv -t cuda` the rest."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import nox

sys.path.insert(0, str(Path(__file__).parent / "tests"))

from cells import CELLS

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each process would compile again all that it imports

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["everything"]

LONGEST = ("jax-cpu", "numpy-cpu", "fast-cpu", "torch-cpu", "minimums", "dask-cpu", "demo", "docs")
"""What takes longest, so that nothing long begins last."""

NAMES = ("executors/test_conformance", "executors/test_programs", "test_numerics", "test_all_reduce")
COMPILED = [f"tests/{name}.py" for name in NAMES]
"""What the cell fast-cpu runs where no paths are given: most other tests take longer to compile for than to run."""

NAMES = ("executors/test_conformance", "test_libraries", "test_sizes", "test_onnx_models")
PARTS = [f"tests/{name}.py" for name in NAMES]
"""What the cells of MLX, ndonnx and other libraries run."""

PROJECT = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text())


@nox.session(venv_backend="none")
def everything(session):
    """All that needs no GPU: as many sessions at once as there are processors, each in one process."""
    names = [f"tests({cell.id})" for cell in CELLS if "cuda" not in cell.tags]
    names += ["lint", "typecheck", "docs", "package", "minimums", "mpi", "demo"]
    names.sort(key=lambda name: next((i for i, each in enumerate(LONGEST) if each in name), len(LONGEST)))
    env = os.environ | {"PYTEST_XDIST_AUTO_NUM_WORKERS": "0"}
    failed = []

    def run(name):
        command = [sys.executable, "-m", "nox", "--session", name]
        start = time.perf_counter()
        done = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        return name, done, time.perf_counter() - start

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for each in as_completed([pool.submit(run, name) for name in names]):
            name, done, seconds = each.result()
            print(done.stdout, flush=True)
            session.log(f"{name}: {'failed' if done.returncode else 'passed'} after {seconds:.0f} s")
            failed += [name] * bool(done.returncode)
    if failed:
        session.error(f"these failed: {', '.join(failed)}")


@nox.session
@nox.parametrize("cell", [nox.param(cell, id=cell.id, tags=cell.tags) for cell in CELLS])
def tests(session, cell):
    """One cell of the table in tests/cells.py, with its own library and no other."""
    install(session, *cell.groups)
    if cell.library == "frameworks":  # of this package a file of weights alone is read
        pip(session, "--no-deps", *PROJECT["dependency-groups"]["checkpoint"])
    # the command line has its session, `demo`
    whole = {"numpy-cpu": ["tests", "anynorm", "README.md", "--ignore=tests/test_cli.py"], "fast-cpu": COMPILED}
    whole["frameworks-cpu"] = ["tests/test_checkpoints.py"]
    whole |= {f"{name}-cpu": PARTS for name in ("mlx", "ndonnx", "others")}
    paths = session.posargs or whole.get(cell.id, ["tests"])
    pytest(session, f"--cell={cell.id}", *paths)


@nox.session
def minimums(session):
    """The lowest versions that pyproject.toml allows, but for PyTorch's, under the newest of the test tools."""
    extras = [*lowest("safetensors"), *lowest("fast"), *lowest("jax"), *lowest("dask")]
    pip(session, *PROJECT["dependency-groups"]["test"], *extras, *lowest()[1:])
    # the test tools ask for a newer array-api-compat than the library does
    pip(session, "--no-deps", ".", *lowest())
    # what measures memory, starts threads, runs the command line or kills does not depend on them
    names = ("norms", "vjp", "numerics", "edges", "merging", "state", "files", "out", "bad_input", "laws", "weights")
    paths = ["tests/executors/test_conformance.py", "tests/kernels", *(f"tests/test_{name}.py" for name in names)]
    without = "not cuda and not kill_9 and not many_states"
    pytest(session, "--cell=numpy-cpu", "--every=6", *paths, "-k", without)
    for cell in ("jax-cpu", "dask-cpu"):
        pytest(session, f"--cell={cell}", "--every=16", paths[0], "tests/test_vjp.py", "tests/test_state.py")
    session.env["ANYNORM_ENGINE"] = "numba"
    pytest(session, "--cell=numpy-cpu", "tests/test_norms.py")


@nox.session
def minimum_torch(session):
    """The lowest version of PyTorch, which brings some GB of CUDA with it: `nox -s minimum_torch`."""
    install(session, "test", packages=lowest("torch"))
    names = ("executors/test_conformance", "executors/test_torch_autograd", "test_vjp", "test_state")
    pytest(session, "--cell=torch-cpu", *(f"tests/{name}.py" for name in names))


def lowest(extra=None):
    """The lowest versions of the dependencies, or of an extra, array-api-compat first."""
    project = PROJECT["project"]
    packages = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return [each.replace(">=", "==") for each in packages]


@nox.session
def mpi(session):
    """Batch norm over two and three processes of MPI."""
    install(session, "test", "mpi")
    pytest(session, "--cell=numpy-cpu", "tests/test_all_reduce.py")


@nox.session(python="3.13t")
def freethreaded(session):
    """Without the interpreter's lock: `nox -s freethreaded`, where there is a python3.13t, which has no safetensors."""
    groups = [each for each in PROJECT["dependency-groups"]["test"] if "safetensors" not in each]
    pip(session, "--only-binary=:all:", *groups, *PROJECT["project"]["dependencies"])  # the newest may have no wheel
    pip(session, "-e", ".")
    without = "not safetensors and not pickles_and_packed and not saved_loaded_and_moved"
    session.env["PYTHON_GIL"] = "0"
    pytest(session, "--cell=numpy-cpu", "tests", "--ignore=tests/test_onnx.py", "-k", without)


@nox.session
def lint(session):
    pip(session, *PROJECT["dependency-groups"]["lint"])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typecheck(session):
    """The package by mypy; what a user infers, and the code that the pages print, by mypy and pyright."""
    pip(session, *PROJECT["dependency-groups"]["typecheck"], ".[demo]")
    session.run("mypy")
    folder = Path(session.create_tmp()).resolve() / "printed"
    session.run("python", "tests/printed_code.py", str(folder))
    pages = [str(path) for place in (folder, Path("docs/examples")) for path in sorted(place.glob("*.py"))]
    session.run("mypy", *pages)
    session.run("pyright", "tests/typed_use.py", *pages)


@nox.session
def docs(session):
    """Warnings are errors, and so are the errors of the how-tos, which are run."""
    install(session, "docs")
    shutil.rmtree("docs/gallery", ignore_errors=True)  # what is there would not be run again
    one = {"OMP_NUM_THREADS": "1"}  # two libraries with a thread for each processor wait for one another
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html", env=one)


@nox.session
def package(session):
    """What could be published: built, its page looked at, and the wheel tried on the oldest and the newest Python."""
    pip(session, *PROJECT["dependency-groups"]["package"])
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"))
    session.run("twine", "check", "--strict", *map(str, (folder / "dist").iterdir()))
    (wheel,) = (folder / "dist").glob("*.whl")
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        page = message_from_bytes(archive.read(name)).get_payload()
    if relative := re.findall(r"\]\((?!https?://)([^)]*)\)", page):
        session.error(f"links that lead nowhere from a package index: {', '.join(relative)}")
    if ".invalid" in page:
        session.warn("the address in [project.urls] is a placeholder: set it before you publish")
    found = interpreters()
    oldest, newest = min(found), max(found)
    if oldest == newest or f">=3.{oldest}" != PROJECT["project"]["requires-python"]:
        session.warn(f"of the Pythons that are allowed only these are here: {', '.join(f'3.{each}' for each in found)}")
    readme = str(Path("README.md").resolve())
    for minor in sorted({oldest, newest}):
        place = folder / f"python3.{minor}"
        session.run("virtualenv", "--quiet", "--clear", "--python", found[minor], str(place))
        bin_ = place / ("Scripts" if sys.platform == "win32" else "bin")
        session.run(str(bin_ / "python"), "-m", "pip", "install", "--quiet", "--no-compile", str(wheel), external=True)
        with session.chdir(folder):  # where no checkout is in the way
            session.run(str(bin_ / "anynorm"), "--version", external=True)
            session.run(str(bin_ / "python"), "-m", "doctest", readme, external=True)


def interpreters():
    """The Pythons that the package allows, and that are here and start, by the second number of their version."""
    least = int(PROJECT["project"]["requires-python"].removeprefix(">=3."))
    pyenv = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser() / "versions"
    found = {}
    for minor in range(least, least + 12):
        for each in (shutil.which(f"python3.{minor}"), *sorted(pyenv.glob(f"3.{minor}.*/bin/python"))):
            if each and subprocess.run([each, "-c", ""], capture_output=True, check=False).returncode == 0:
                found[minor] = str(each)
                break
    return found


@nox.session
def demo(session):
    """The main job, and the command line around it."""
    pip(session, ".[demo]", *PROJECT["dependency-groups"]["test"])
    session.run("anynorm", "demo", "--plot", str(Path(session.create_tmp()) / "anynorm-demo.png"))
    session.env["ANYNORM_DEMO"] = "1"
    pytest(session, "--cell=numpy-cpu", "--dist=loadgroup", "tests/test_cli.py")


@nox.session
def bench(session):
    """Measure and write the report: `nox -s bench`, or `nox --no-venv -s bench -- --device cuda`."""
    install(session, "bench")
    session.run(*python(session), "docs/benchmarks", *session.posargs)


def pytest(session, *args):
    """In a process for each processor, with a thread each where a library would start one for every processor.

    JAX compiles each operation for each shape, numba each kind of call: what one of them has compiled the others read.
    """
    session.run(
        *python(session),
        "-m",
        "pytest",
        "--numprocesses=auto",
        "--dist=worksteal",
        *args,
        env={
            "OMP_NUM_THREADS": "1",
            "NUMBA_CACHE_DIR": str(session.cache_dir.resolve() / "numba"),
            "JAX_COMPILATION_CACHE_DIR": str(session.cache_dir.resolve() / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        },
    )


def pip(session, *args):
    """Without compiling: of what is installed most is never imported."""
    session.install("--no-compile", *args)


def python(session):
    """The session's interpreter; the one that nox runs in, where that must bring its own packages (--no-venv)."""
    return ["python"] if session.venv_backend != "none" else [sys.executable]


def install(session, *groups, packages=()):
    """What the groups and the project need, and these packages.

    The project itself is imported from here, which takes no time to build. Nothing is installed where the interpreter
    must bring its own packages (--no-venv).
    """
    session.env["PYTHONPATH"] = str(Path(__file__).parent.resolve())
    if session.venv_backend == "none":
        return
    needed = [package for group in groups for package in PROJECT["dependency-groups"].get(group, [])]
    pip(session, *needed, *packages, *PROJECT["project"]["dependencies"])
