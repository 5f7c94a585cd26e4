"""The README and the documentation: their blocks are run, their numbers measured, their picture drawn again."""

import dataclasses
import re
import tomllib
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from oracles import standardized, standardized_gradient

import anynorm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
START = (ROOT / "docs" / "start.md").read_text()


class Use(NamedTuple):
    """What a block of the first steps does, for the oracle."""

    heading: str
    shape: tuple[int, ...]
    """Of x, split so that whole axes share a mean."""
    axes: tuple[int, ...]
    """The axes that share it."""
    parameter: tuple[int, ...]
    """The shape of gamma beside it."""


USES = {
    "numpy": Use("NumPy", (8, 32, 2, 49), (2, 3), (1, 32, 2, 1)),
    "cupy": Use("CuPy", (8, 7, 7, 64), (0, 1, 2), (1, 1, 1, 64)),
    "torch": Use("PyTorch", (8, 20, 512), (2,), (1, 1, 512)),
    "jax": Use("JAX", (8, 64, 49), (2,), (1, 64, 1)),
}
INSTALL = re.compile(r"pip install\s+((?:-e )?(?:'[^']*'|[\w.-]+|\{[^}]*\}))")
OTHERS = ["Training step", "Inference step", "A batch norm from a PyTorch checkpoint"]


def block(heading, text=START):
    """The code under a heading."""
    return re.search(rf"^#+ {re.escape(heading)}$.*?^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]


def load(name):
    """A script of the documentation, as a module."""
    spec = spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on(backend):
    """Where new arrays are made on the backend's device."""
    if backend.library == "jax":
        import jax

        return jax.default_device(backend.device)
    return backend.device if backend.library in ("torch", "cupy") else nullcontext()


@pytest.mark.cells("numpy", "torch", "jax", "cupy")
def test_the_block_for_each_library_gives_what_the_formulas_give(backend):
    use, names = USES[backend.library], {}
    with on(backend):
        exec(block(use.heading), names)
    x, gamma, beta, dy = (backend.numpy(names[name]) for name in ("x", "gamma", "beta", "dy"))
    x, dy, gamma, beta = x.reshape(use.shape), dy.reshape(use.shape), *(p.reshape(use.parameter) for p in (gamma, beta))
    xhat = standardized(x, use.axes)
    spread = tuple(axis for axis, n in enumerate(use.parameter) if n == 1)
    expected = {
        "y": xhat * gamma + beta,
        "dx": standardized_gradient(x, dy * gamma, use.axes),
        "dgamma": (dy * xhat).sum(axis=spread),
        "dbeta": dy.sum(axis=spread),
    }
    for name, value in expected.items():
        primal = names[{"y": "x", "dx": "x", "dgamma": "gamma", "dbeta": "beta"}[name]]
        found = names[name]
        assert type(found).__module__ == type(primal).__module__
        assert (found.dtype, found.shape) == (primal.dtype, primal.shape)
        numbers = backend.numpy(found).reshape(value.shape)
        np.testing.assert_allclose(numbers, value.astype(np.float64), rtol=1e-4, atol=1e-4)


@pytest.fixture
def step(backend):
    """The arrays that the training and the inference step are given, and the same numbers in NumPy."""
    rng = np.random.default_rng(0)
    shapes = {"x": (4, 64, 3, 3), "dy": (4, 64, 3, 3), "gamma": (64,), "beta": (64,)}
    numbers = {name: rng.standard_normal(shape) + 2.0 for name, shape in shapes.items()}
    return {"anynorm": anynorm} | {name: backend.array(each) for name, each in numbers.items()}, numbers


def test_the_training_step_is_the_one_of_the_summary(backend, step):
    names, numbers = step
    exec(block("Training step"), names)
    x, dy, gamma, beta = (numbers[name] for name in ("x", "dy", "gamma", "beta"))
    gamma, beta = gamma[:, None, None], beta[:, None, None]
    xhat = standardized(x, (0, 2, 3))
    expected = {
        "y": xhat * gamma + beta,
        "dx": standardized_gradient(x, dy * gamma, (0, 2, 3)),
        "dgamma": (dy * xhat).sum(axis=(0, 2, 3)),
        "dbeta": dy.sum(axis=(0, 2, 3)),
    }
    tolerance = max(backend.tolerance, 1e-9) * 10
    for name, value in expected.items():
        backend.check(names[name], value.astype(np.float64), tolerance=tolerance)
    backend.check(names["running"].mean, 0.1 * x.mean(axis=(0, 2, 3)), tolerance=tolerance)
    backend.check(names["running"].var, 0.9 + 0.1 * x.var(axis=(0, 2, 3)), tolerance=tolerance)


def test_the_inference_step_normalizes_with_what_is_given(backend, step):
    names, numbers = step
    mean, var = np.linspace(-1, 1, 64), np.linspace(1, 3, 64)
    names["running"] = anynorm.RunningStats(backend.array(mean), backend.array(var))
    exec(block("Inference step"), names)
    mean, var, gamma, beta = (each[:, None, None] for each in (mean, var, numbers["gamma"], numbers["beta"]))
    backend.check(names["y"], (numbers["x"] - mean) / np.sqrt(var + 1e-5) * gamma + beta)


@pytest.fixture
def trained(backend):
    """PyTorch's batch norm after some steps, and an input of its size."""
    torch = backend.xp
    torch.manual_seed(0)

    def make(**options):
        module = torch.nn.BatchNorm2d(6, **options)
        with torch.no_grad():
            module.weight.uniform_()
            module.bias.uniform_()
        for n in (2, 3, 4):
            module(torch.randn(8, 6, 5, 5) * n + n)
        return module

    return make, torch.randn(8, 6, 5, 5) - 3


@pytest.mark.cells("torch")
def test_a_checkpoint_of_pytorch_goes_on_as_in_pytorch(backend, trained, tmp_path, monkeypatch):
    torch, (make, x) = backend.xp, trained
    module = make()
    torch.save(torch.nn.ModuleDict({"bn1": module}).state_dict(), tmp_path / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    names = {"x": x}
    exec(block("A batch norm from a PyTorch checkpoint"), names)
    torch.testing.assert_close(names["inferred"], module.eval()(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(names["trained"], module.train()(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(names["running"].mean, module.running_mean)
    torch.testing.assert_close(names["running"].var, module.running_var)

    state = {name: each.numpy() for name, each in names["state"].items()}
    running = anynorm.RunningStats(state["bn1.running_mean"], state["bn1.running_var"])
    y = anynorm.batch_norm(x.numpy(), state["bn1.weight"], state["bn1.bias"], moments=running)
    np.testing.assert_allclose(y, names["inferred"], rtol=1e-5, atol=1e-5)


@pytest.mark.cells("torch")
def test_a_module_without_momentum_goes_on_with_the_mean_of_pytorch(backend, trained):
    torch, (make, x) = backend.xp, trained
    module = make(momentum=None)
    state = torch.nn.ModuleDict({"bn1": module}).state_dict()
    names = {"anynorm": anynorm, "n": 8 * 5 * 5, "state": {name: each.clone() for name, each in state.items()}}
    text = (ROOT / "docs" / "conventions.md").read_text()
    exec(block("A PyTorch module whose momentum is None", text), names)
    _, batch = anynorm.batch_norm(x, return_moments=True)
    running = names["running"].update(batch)
    module(x)
    torch.testing.assert_close(running.mean, module.running_mean)
    assert running.count == 4 * names["n"]
    assert torch.all(running.var > module.running_var + 1)  # the spread between the batches


def test_a_forecast_comes_back_to_the_scale_of_the_past(backend):
    rng, text = np.random.default_rng(1), (ROOT / "docs" / "conventions.md").read_text()
    past, gamma, beta = rng.standard_normal((2, 7, 3)) * 5 + 100, *rng.uniform(1, 2, (2, 1, 1, 3))
    names = {name: backend.array(each) for name, each in (("past", past), ("gamma", gamma), ("beta", beta))}
    names |= {"anynorm": anynorm, "model": lambda y: y[:, -2:, :]}
    exec(block("The way back", text), names)
    backend.check(names["forecast"], past[:, -2:, :], tolerance=100 * backend.tolerance)


def test_the_mean_alone_is_taken_away_in_training_and_inference(backend):
    x = np.random.default_rng(2).standard_normal((4, 3, 2, 2))
    names = {"anynorm": anynorm, "x": backend.array(x), "beta": backend.array(np.ones((1, 3, 1, 1)))}
    names["running"] = anynorm.RunningStats.init(3, like=names["x"], momentum=0)
    exec(block("The mean alone", (ROOT / "docs" / "conventions.md").read_text()), names)
    backend.check(names["y"], x - x.mean(axis=(0, 2, 3), keepdims=True) + 1)


@pytest.mark.cells("numpy")
def test_no_block_of_the_first_steps_is_left_out():
    assert START.count("```python\n") == len(USES) + len(OTHERS)
    found = [block(heading) for heading in (*(use.heading for use in USES.values()), *OTHERS)]
    assert len(set(found)) == START.count("```python\n")


@pytest.mark.cells("numpy")
def test_the_readme_is_read_in_some_minutes():
    assert len(README.split()) <= 900


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("name", ["test", "demo"])
def test_the_set_up_lines_can_be_found(name):
    line = re.search(rf"^<!-- {name} line -->\n```bash\n(.*)\n```$", README, re.MULTILINE)[1]
    assert line.startswith("python3 -m venv .venv")


@pytest.mark.cells("numpy")
def test_a_hint_names_packages_and_a_page_the_checkout():
    """The first installs wherever anynorm came from, the second before it is on an index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    packages = {re.match(r"[\w-]+", each)[0] for needed in extras.values() for each in needed} | {"ml_dtypes"}
    hints = [each for path in (ROOT / "anynorm").rglob("*.py") for each in INSTALL.findall(path.read_text())]
    assert len(hints) == 5
    assert {each for each in hints if not each.startswith("{")} <= packages  # the others: tests/test_cli.py
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for line in (each for path in pages for each in INSTALL.findall(path.read_text())):
        place, chosen = re.fullmatch(r"(?:-e )?'?([\w.-]+)(?:\[(.*)\])?'?", line).groups()
        assert place in {".", "nox", *packages} or line == "'anynorm[torch]'"
        assert set(chosen.split(",") if chosen else ()) <= set(extras)


@pytest.mark.cells("numpy", "torch", "jax")
def test_the_printed_errors_are_those_that_are_measured(backend):
    script, whole = load("measure_numerics"), (ROOT / "docs" / "numerics.md").read_text()
    column = {"numpy": "anynorm, NumPy", "torch": "anynorm, PyTorch", "jax": "anynorm, JAX"}[backend.library]
    for measure in script.MEASURES:
        printed = re.search(rf"^{re.escape(measure.title)}:\n\n((?:\|.*\n)+)", whole, re.MULTILINE)[1]
        names, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines())
        for given, line in zip(script.INPUTS, lines, strict=True):
            assert line[0] == given.title
            assert script.error(column, measure, given) <= 2 * float(line[names.index(column)])


@pytest.mark.cells("numpy")
def test_the_errors_in_the_readme_are_those_of_the_table():
    text = (ROOT / "docs" / "numerics.md").read_text()
    titles, *rows = re.search(r"^Layer norm, shape \(256, 1000\):\n\n((?:\|.*\n)+)", text, re.MULTILINE)[1].splitlines()
    (row,) = [row for row in rows if row.startswith("| mean 1e4 |")]
    errors = dict(zip(map(str.strip, titles.split("|")), map(str.strip, row.split("|")), strict=True))
    digits = " ".join(re.search(r"^- \*\*Digits\..*?(?=^- )", README, re.MULTILINE | re.DOTALL)[0].split())
    assert (
        f"is {errors['anynorm, NumPy']} on NumPy; that of `torch.nn.functional` is {errors['torch.nn.functional']}."
        in digits
    )


@pytest.mark.cells("numpy")
def test_the_picture_shows_the_sets_of_the_paper():
    script = load("figure_norms")
    sets = {  # Wu & He (2018), eq. 3 to 7: the indices that an element shares with the first one, (0, 0, 0, 0)
        "Batch norm": lambda n, c: c == 0,
        "Layer norm": lambda n, c: n == 0,
        "Instance norm": lambda n, c: n == 0 and c == 0,
        "Group norm": lambda n, c: n == 0 and c // (script.SHAPE[1] // 2) == 0,
    }
    assert [panel.title for panel in script.PANELS] == list(sets)
    for panel in script.PANELS:
        blue = script.shares_statistics(panel.norm)
        for index in np.ndindex(*script.SHAPE):
            assert blue[index] == sets[panel.title](*index[:2])


@pytest.mark.cells("numpy")
def test_the_picture_is_the_one_that_the_script_draws():
    script = load("figure_norms")
    assert script.FILE.read_text() == script.draw()


@pytest.fixture
def stateful(backend, tmp_path, monkeypatch):
    """What the blocks about state are given: pieces of unequal sizes, and the whole in NumPy."""
    monkeypatch.chdir(tmp_path)
    whole = np.random.default_rng(3).standard_normal((12, 3, 4)) + np.arange(12.0)[:, None, None]
    pieces = [backend.array(each) for each in np.split(whole, [1, 6])]
    x, three = backend.array(whole), backend.array(np.ones(3))
    running = anynorm.RunningStats.init(3, like=x)
    return {"anynorm": anynorm, "x": x, "gamma": three, "beta": three, "pieces": pieces, "running": running}, whole


def run_state(heading, names):
    """Run all blocks of a section of the page about state."""
    text = (ROOT / "docs" / "state.md").read_text()
    blocks = blocks_of(heading, text)
    for each in blocks:
        exec(each, names)
    return len(blocks)


def blocks_of(heading, text):
    section = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)[1]
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def test_accumulated_pieces_move_the_running_statistics_as_the_whole_batch_does(backend, stateful):
    names, whole = stateful
    assert run_state("Gradient accumulation", names) == 1
    backend.check(names["running"].mean, 0.1 * whole.mean(axis=(0, 2)))
    backend.check(names["running"].var, 0.9 + 0.1 * whole.var(axis=(0, 2)))
    assert names["running"].count == 48


def test_unequal_replicas_normalize_as_one(backend, stateful):
    names, whole = stateful
    names["shards"] = names["pieces"]
    assert run_state("Unequal replicas", names) == 1
    found = np.concatenate([backend.numpy(each) for each in names["outputs"]])
    np.testing.assert_allclose(found, standardized(whole, (0, 2)).astype(float) + 1, atol=max(backend.tolerance, 1e-9))


def test_federated_workers_are_joined_from_their_files(backend, stateful):
    names, whole = stateful
    text = (ROOT / "docs" / "state.md").read_text()
    for number, piece in enumerate(names["pieces"]):
        exec(block("Federated workers", text), names | {"batches": [piece], "number": number})
    names |= {"batches": [], "number": "none"}
    assert run_state("Federated workers", names) == 2
    everything = names["everything"]
    assert isinstance(everything.mean, np.ndarray)
    assert everything.count == 48
    tolerance = max(backend.tolerance, 1e-9)
    np.testing.assert_allclose(everything.mean, whole.mean(axis=(0, 2)), rtol=tolerance)
    np.testing.assert_allclose(everything.var, whole.var(axis=(0, 2)), rtol=tolerance)


def test_what_does_not_fit_into_memory_is_taken_in_batches(backend, stateful):
    names, whole = stateful
    names["batches"] = iter(names["pieces"])
    assert run_state("More than fits into memory", names) == 1
    backend.check(names["whole"].mean, whole.mean(axis=(0, 2)))
    backend.check(names["whole"].var, whole.var(axis=(0, 2)))


def test_missing_values_and_integers_are_taken_as_the_page_says(backend, stateful):
    if not backend.float64:
        pytest.skip(reason="there is no float64")
    plain, (names, whole) = dataclasses.replace(backend, tracked=False), stateful
    parts = [whole[:5, :, 0].copy(), whole[5:, :, 0]]
    parts[0][1] = np.nan
    signal = plain.array(np.round(whole * 100), "int16")
    names |= {"batches": map(plain.array, parts), "xp": backend.xp, "x": plain.array(parts[1]), "signal": signal}
    names["result"] = plain.array(np.zeros(whole.shape), "float32")
    text = (ROOT / "docs" / "state.md").read_text()
    first, second = blocks_of("Missing values, weights and integers", text)
    exec(first, names)
    seen = np.concatenate([parts[0][[0, 2, 3, 4]], parts[1]])
    plain.check(names["scores"], (parts[1] - seen.mean(axis=0)) / seen.std(axis=0, ddof=1))
    if backend.library in ("numpy", "torch", "strict"):  # elsewhere there is no out
        exec(second, names)
        expected = standardized(plain.numpy(signal), (0, 2)).astype(float)
        plain.check(names["result"], expected, dtype="float32", tolerance=1e-5)


def test_data_sets_are_mixed_as_the_page_says(backend, stateful):
    names, whole = stateful
    one, other = (anynorm.moments(backend.array(each), axis=(0, 2)) for each in (whole[:2], whole[2:]))
    names |= {"simulated": one, "measured": other}
    assert run_state("A mixture of data sets", names) == 1
    backend.check(names["mixed"].mean, (whole[:2].mean(axis=(0, 2)) + 3 * whole[2:].mean(axis=(0, 2))) / 4)


def test_running_statistics_start_right_as_the_page_says(backend, stateful):
    names, whole = stateful
    names["batches"] = [names["x"]]
    assert run_state("The start of running statistics", names) == 1
    backend.check(names["running"].mean, whole.mean(axis=(0, 2)))


def test_states_are_saved_loaded_and_moved_as_the_page_says(backend, stateful):
    names, whole = stateful
    weight = backend.array(whole[0])
    names |= {"weight": anynorm.WeightNorm.from_weight(weight)}
    assert run_state("Saving", names) == 1
    backend.check(names["states"]["fc"].v, whole[0], tolerance=0)
    backend.check(names["states"]["bn1.gamma"], np.ones(3), tolerance=0)
    assert repr(names["states"]["bn1"]) == repr(names["running"])
    assert run_state("Moving", names) == 1
    assert repr(names["here"]) == repr(names["running"])


@pytest.mark.cells("numpy")
def test_no_block_about_state_is_left_out():
    assert (ROOT / "docs" / "state.md").read_text().count("```python\n") == 11
