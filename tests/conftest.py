"""One cell a run: `pytest --cell=torch-cpu`. A cell that is asked for and cannot run is an error, never a skip.

Where none is named, it is a first look: of NumPy's tests one in `LOOK` of the cases.
"""

import os

import backends
import pytest
from cells import CELLS
from hypothesis import settings

settings.register_profile("eager", deadline=None, derandomize=True, max_examples=50)
# each new shape is compiled, or a graph of its own
settings.register_profile("lazy", settings.get_profile("eager"), max_examples=3)

LOOK = 8
collect_ignore = ["jax_replicas.py", "mpi_replica.py", "torch_replica.py"]  # which tests run in processes of their own


def pytest_addoption(parser):
    names = [cell.id for cell in CELLS]
    parser.addoption("--cell", choices=names, help="the library and device to test (a part of numpy-cpu)")
    parser.addoption("--every", type=int, help="one in so many cases of each test alone")


def pytest_configure(config):
    config.addinivalue_line("markers", "cells(*names): runs in these cells alone, or those of these libraries")
    config.addinivalue_line("markers", "untracked: on arrays that require no gradient")
    config.addinivalue_line("markers", "runs_if(function): where it is true of the executor and the parameters")
    option = config.option  # which goes to the processes of pytest-xdist too
    if option.cell is None:
        option.cell, option.every = "numpy-cpu", option.every or LOOK
    cell = next(cell for cell in CELLS if cell.id == option.cell)
    config.stash[backends.EVERY] = option.every or cell.every, option.every or 1
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
        if not wanted or not all((own | {cell}) & {*marker.args} for marker in item.iter_markers("cells")):
            others.append(item)
        elif "executor" not in parameters:  # executors/conftest.py draws those
            chosen.append(item)
    others += backends.drawn(chosen, "backend", *config.stash[backends.EVERY])[1]
    left = {*others}
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=others)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        found = metafunc.config.stash[backends.BACKENDS]
        if found[0].library == "strict":  # the conformance suite runs on all devices
            found = [each for each in found if each.device in backends.two_devices(each)]
        metafunc.parametrize("backend", found, ids=repr)


def pytest_report_header(config):
    every, _ = config.stash[backends.EVERY]
    return f"cell: {config.option.cell}, {f'one in {every}' if every > 1 else 'all'} of the cases"
