"""One cell a run: `pytest --cell=torch-cpu`. A cell that is asked for and cannot run is an error, never a skip."""

import os

import backends
import pytest
from cells import CELLS
from hypothesis import settings

settings.register_profile("eager", deadline=None, derandomize=True, max_examples=50)
# each new shape is compiled, or a graph of its own
settings.register_profile("lazy", settings.get_profile("eager"), max_examples=3)

collect_ignore = ["jax_replicas.py", "mpi_replica.py", "torch_replica.py"]  # which tests run in processes of their own


def pytest_addoption(parser):
    names = [cell.id for cell in CELLS]
    parser.addoption("--cell", choices=names, default="numpy-cpu", help="the library and device to test")
    parser.addoption("--every", type=int, default=0, help="one in so many cases of each test alone, for a quick run")


def pytest_configure(config):
    config.addinivalue_line("markers", "cells(*names): runs in these cells alone, or those of these libraries")
    config.addinivalue_line("markers", "untracked: on arrays that require no gradient")
    config.addinivalue_line("markers", "runs_if(function): where it is true of the executor and the parameters")
    cell = next(cell for cell in CELLS if cell.id == config.getoption("--cell"))
    settings.load_profile("lazy" if cell.library in ("jax", "dask", "fast") else "eager")
    if cell.library == "fast":
        os.environ["ANYNORM_ENGINE"] = "numba"
    config.stash[backends.CELL] = cell
    try:
        config.stash[backends.BACKENDS] = backends.backends(cell)
    except backends.Missing as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collection_modifyitems(config, items):
    cell, libraries = config.getoption("--cell"), {backend.library for backend in config.stash[backends.BACKENDS]}
    chosen, others = [], []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        of = parameters.get("backend") or getattr(parameters.get("executor"), "backend", None)
        own = {of.library} if of else libraries
        wanted = not (getattr(of, "tracked", False) and any(item.iter_markers("untracked")))
        wanted = wanted and all((own | {cell}) & {*marker.args} for marker in item.iter_markers("cells"))
        (chosen if wanted else others).append(item)
    step = 3 if config.stash[backends.CELL].library in COMPILED else 1
    items[:], left = backends.drawn(chosen, "backend", config.getoption("--every") or step)
    config.hook.pytest_deselected(items=others + left)


COMPILED = ("jax",)
"""Cells in which each case of a test is compiled: NumPy's runs them all."""


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        found = metafunc.config.stash[backends.BACKENDS]
        if found[0].library == "strict":  # the conformance suite runs on all devices
            found = [each for each in found if each.device in backends.two_devices(each)]
        metafunc.parametrize("backend", found, ids=repr)


def pytest_report_header(config):
    return f"cell: {config.getoption('--cell')} on {config.stash[backends.BACKENDS]}"
