"""One cell a run: `pytest --cell=torch-cpu`. A cell that is asked for and cannot run is an error, never a skip."""

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


def pytest_configure(config):
    config.addinivalue_line("markers", "cells(*names): runs in these cells alone, or those of these libraries")
    config.addinivalue_line("markers", "divided: array-api-strict's devices share the cases, each case runs on one")
    cell = next(cell for cell in CELLS if cell.id == config.getoption("--cell"))
    settings.load_profile("lazy" if cell.library in ("jax", "dask") else "eager")
    try:
        config.stash[_BACKENDS] = backends.backends(cell)
    except backends.Missing as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collection_modifyitems(config, items):
    library, cell = config.stash[_BACKENDS][0].library, config.getoption("--cell")
    chosen, others, turns = [], [], {}
    for item in items:
        wanted = all({library, cell} & {*marker.args} for marker in item.iter_markers("cells"))
        (chosen if wanted and (library != "strict" or _has_its_turn(item, turns)) else others).append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=others)


def _has_its_turn(item, turns):
    """Whether a case of a divided test is to run on the device it was made for."""
    if item.get_closest_marker("divided") is None:
        return True
    devices, own = item.config.stash[_BACKENDS], item.callspec.params["backend"]
    case = tuple((name, repr(value)) for name, value in item.callspec.params.items() if name != "backend")
    cases = turns.setdefault(item.originalname, {})
    return devices.index(own) == cases.setdefault(case, len(cases)) % len(devices)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.stash[_BACKENDS], ids=repr)


def pytest_report_header(config):
    return f"cell: {config.getoption('--cell')} on {config.stash[_BACKENDS]}"


_BACKENDS = pytest.StashKey()
