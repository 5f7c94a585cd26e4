"""The benchmarks: that what is compared is the same thing, and that the report says what was seen."""

import json
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import devices
import formula
import measure
import numpy as np
import oracles
import pytest
import report
import targets
from candidates import COPY, PEER, Candidate, candidates
from oracles import Case
from works import GIGABYTE, WORKS, Work

import anynorm
from anynorm import settings

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"

once = pytest.mark.cells("numpy")
where_it_is_measured = pytest.mark.cells("numpy", "torch", "jax", "cupy", "fast-cpu")

BATCH, LAST = {"channel_axis": 1}, {"channel_axis": -1}
PAPERS = {
    Work("layer_norm", (3, 5)): Case(anynorm.layer_norm, (3, 5), {}, lambda i: i[0], lambda i: (i[1],), (5,)),
    Work("rms_norm", (3, 5)): Case(anynorm.rms_norm, (3, 5), {}, lambda i: i[0], lambda i: (i[1],), (5,)),
    Work("weight_norm", (3, 5)): Case(anynorm.weight_norm, (3, 5), {}, lambda i: i[0], lambda i: (i[0],), (3,)),
    Work("batch_norm", (3, 2, 2, 2)): Case(
        anynorm.batch_norm, (3, 2, 2, 2), BATCH, lambda i: i[1], lambda i: (i[1],), (2,)
    ),
    Work("batch_norm", (3, 2, 2, 2), inference=True): Case(
        anynorm.batch_norm, (3, 2, 2, 2), BATCH, lambda i: i[1], lambda i: (i[1],), (2,)
    ),
    Work("batch_norm", (3, 2, 2, 4), channel_axis=-1): Case(
        anynorm.batch_norm, (3, 2, 2, 4), LAST, lambda i: i[3], lambda i: (i[3],), (4,)
    ),
    Work("group_norm", (2, 6, 2, 2), groups=3): Case(
        anynorm.group_norm, (2, 6, 2, 2), BATCH | {"groups": 3}, lambda i: (i[0], i[1] // 2), lambda i: (i[1],), (6,)
    ),
    Work("group_norm", (2, 2, 2, 6), groups=3, channel_axis=-1): Case(
        anynorm.group_norm, (2, 2, 2, 6), LAST | {"groups": 3}, lambda i: (i[0], i[3] // 2), lambda i: (i[3],), (6,)
    ),
    Work("instance_norm", (2, 3, 2, 3)): Case(
        anynorm.instance_norm, (2, 3, 2, 3), BATCH, lambda i: i[:2], lambda i: (i[1],), (3,)
    ),
}
"""The kinds of work, small, and what the papers say of them."""
MASKED = {
    work._replace(masked=True): PAPERS[work] for work in (Work("layer_norm", (3, 5)), Work("batch_norm", (3, 2, 2, 2)))
}
SMALL = PAPERS | MASKED


def kind(work):
    return work._replace(shape=(), groups=1, dy_mean=0)


def each_small_work():
    return [*SMALL, *(work._replace(gradient=True) for work in PAPERS)]


@once
def test_every_norm_is_measured_forward_and_with_gradient():
    measured = {(work.norm, work.gradient) for work in WORKS}
    norms = {name for name in anynorm.__all__ if name.endswith("_norm")}
    assert measured == {(norm, gradient) for norm in norms for gradient in (False, True)}


@once
def test_every_kind_of_work_has_a_small_one():
    assert {kind(work) for work in (*WORKS, *GIGABYTE)} == {kind(work) for work in each_small_work()}


@once
@pytest.mark.parametrize("work", SMALL, ids=lambda work: work.title)
def test_the_formula_that_results_are_held_to_is_that_of_the_papers(work):
    case, arrays = SMALL[work], wide(work._replace(gradient=True))
    given = None
    if work.inference:
        given = {channel: (arrays.mean[channel], arrays.var[channel]) for channel in range(work.shape[1])}

    arguments = [arrays.x, arrays.gamma, arrays.beta if "beta" in work.parameters else None]
    expected = oracles.derived(case, arguments, arrays.dy, eps=formula.EPS, given=given, weights=arrays.weights)
    forward = formula.forward(work, np, arrays)(*arrays.differentiated(work))
    np.testing.assert_allclose(forward, expected[0], rtol=1e-12, atol=1e-12)
    if work.masked:
        return  # whose gradient is not measured
    for actual, desired in zip(formula.gradient(work, np, arrays), expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-8, atol=1e-8)


@where_it_is_measured
@pytest.mark.parametrize("work", each_small_work(), ids=lambda work: work.title)
def test_every_candidate_of_a_library_gives_the_formulas_result(work, device, libraries):
    if libraries == ("jax",) and work.norm != "batch_norm":
        pytest.skip(reason="takes too long, and shows nothing new")
    found = candidates(device.name, libraries)
    found = [each for each in found if each.engine != "numba" or len(libraries) > 1]
    found = [each for each in found if "torch.compile" not in each.name]  # each takes ten seconds to compile
    for dtype in device.dtypes:
        row = measure.measure(work, dtype, found, device, 0.0)
        outcomes = {name: outcome.failed for name, outcome in row.outcomes.items()}
        assert not any(outcomes.values()), outcomes
        missing = {each for each in found if each.name not in outcomes}
        assert all(
            (each.name == PEER and work.masked)
            or ("autograd" in each.name and not work.gradient)
            or (each.library == "jax" and dtype == "float64")
            for each in missing
        )


@once
def test_a_candidate_runs_under_its_engine():
    engines = []

    def prepare(work, arrays, device):
        def run():
            engines.append(settings.current().engine)
            return (anynorm.layer_norm(*arrays.differentiated(work)),)

        return run

    found = [Candidate(engine, "numpy", prepare, engine) for engine in ("arrays", "auto")]
    measure.measure(Work("layer_norm", (8, 64)), "float32", found, devices.Cpu(), 0.0)
    assert set(engines[: len(engines) // 2]) == {"arrays", "auto"}
    assert engines.count("arrays") >= 5
    assert engines.count("auto") >= 5


@once
def test_dy_has_the_mean_that_the_work_says():
    work = Work("layer_norm", (64, 64), gradient=True, dy_mean=5)
    assert abs(devices.random_arrays(work).dy.mean() - 5) < 0.1


@once
def test_what_misses_the_speed_to_reach_is_bold():
    numba = "anynorm, NumPy, numba"
    row = a_row("layer norm (4096, 1024)", (4096, 1024), {numba: {"ms": 2.0, "to_peer": 1.3, "bandwidth": 0.8}})
    masked = a_row("layer norm (4096, 1024), random half masked", (4096, 1024), {numba: {"ms": 3.5}})
    large = a_row(
        "batch norm (40, 64, 112, 112)", (40, 64, 112, 112), {numba: {"ms": 2.0, "bandwidth": 0.625}}, "batch_norm"
    )
    small = a_row(
        "layer norm (8, 64)", (8, 64), {numba: {"to_formula": 0.9}, "anynorm, PyTorch, numba": {"to_peer": 1.5}}
    )
    found = report.Report("cpu", {"processor": "P"}, False, [row, masked, large, small])
    assert report.reached(found)[5:] == [
        f"| work | {numba} / {PEER} | {numba} / copy | {numba} / no weights | {numba} / formula "
        f"| anynorm, PyTorch, numba / {PEER} |",
        "|---|---:|---:|---:|---:|---:|",
        "| layer norm (4096, 1024) | **1.30** (1.2) | 1.25 (1.4) |  |  |  |",
        "| layer norm (4096, 1024), random half masked |  |  | **1.75** (1.5) |  |  |",
        "| batch norm (40, 64, 112, 112) |  | 1.60 (1.7) |  |  |  |",
        "| layer norm (8, 64) |  |  |  | **0.900** (0.7) | 1.50 (2.0) |",
    ]
    assert "missed: 3 of 6." in report.markdown(found, figure=False)


@once
def test_every_speed_to_reach_is_of_a_work_that_is_measured():
    seen = set()
    for work in WORKS:
        outcomes = {
            name: {"ms": 1.0, "to_peer": 1.0, "to_formula": 1.0, "bandwidth": 1.0}
            for name in (targets.NUMPY, targets.TORCH)
        }
        row = a_row(work.title, work.shape, outcomes, work.norm, work.gradient)
        plain = a_row(work._replace(masked=False).title, work.shape, outcomes, work.norm)
        for name in outcomes:
            for to, ratio, most in targets.ratios([row, plain], row, name):
                assert ratio == 1
                seen.add((name == targets.NUMPY, work.gradient, to, most))
    forward = {
        (PEER, 1.0),
        (PEER, 1.2),
        (PEER, 0.5),
        ("copy", 1.4),
        ("copy", 1.2),
        ("copy", 1.7),
        ("no weights", 1.5),
        ("formula", 0.7),
    }
    gradient = {(PEER, 1.2), (PEER, 0.6), (PEER, 0.5), ("formula", 1.0)}
    torch = {False: {1.2, 0.6, 2.0}, True: {1.3, 0.6, 2.0}}
    assert {each[2:] for each in seen if each[0] and not each[1]} == forward
    assert {each[2:] for each in seen if each[0] and each[1]} == gradient
    assert {kind: {most for numpy, of, _, most in seen if not numpy and of == kind} for kind in torch} == torch


@once
def test_a_wrong_result_and_an_error_are_failures_with_a_reason_and_the_others_are_measured():
    def fails(*_):
        raise RuntimeError("no kernel in /usr/lib/python3/kernels.py\nand more")

    found = [
        *candidates("cpu", ("numpy",)),
        Candidate("wrong", "numpy", lambda _work, arrays, _device: lambda: (arrays.x,)),
        Candidate("NaN", "numpy", lambda _work, arrays, _device: lambda: (arrays.x * np.nan,)),
        Candidate("a scalar", "numpy", lambda _work, arrays, _device: lambda: (arrays.x[0, 0],)),
        Candidate("raises", "numpy", fails),
    ]
    row = measure.measure(Work("layer_norm", (8, 64)), "float32", found, devices.Cpu(), 0.0)
    assert "must be within" in row.outcomes["wrong"].failed
    assert "got nan" in row.outcomes["NaN"].failed
    assert row.outcomes["a scalar"].failed == "a result must have shape (8, 64), got ()"
    assert row.outcomes["raises"].failed == "no kernel in kernels.py"
    assert row.outcomes["anynorm, NumPy, arrays"].ms > 0
    page = report.markdown(report.Report("cpu", {"processor": "P", "NumPy": "2"}, False, [row]), figure=False)
    assert "- **raises**: `no kernel in kernels.py` (everywhere)" in page
    first_table = page.split("## ")[1].splitlines()
    assert first_table[4].count("|") == first_table[6].count("|")
    assert first_table[6].count("failed") == (4 if find_spec("numba") else 5)


@once
def test_times_ratios_and_bandwidth_agree():
    work = Work("layer_norm", (512, 1024))
    row = measure.measure(work, "float32", candidates("cpu", ("numpy",)), devices.Cpu(), 0.1)
    copy, ours, hand = (row.outcomes[name] for name in (COPY, "anynorm, NumPy, arrays", "formula, NumPy"))
    assert row.rounds >= 3
    assert hand.to_formula == 1
    assert ours.to_peer is None
    assert 0.2 < ours.to_formula / (ours.ms / hand.ms) < 5
    assert 0.2 < ours.bandwidth / (copy.ms / ours.ms) < 5
    low, high = ours.quartiles_ms
    assert low <= ours.ms <= high


@once
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not say")
def test_the_memory_of_a_copy_is_one_x_and_that_of_two_is_two():
    x = np.ones(2**22)
    device = devices.Cpu()
    if device.extra_memory(lambda: ()) is None:
        pytest.skip(reason="the peak cannot be set back here")
    for copies in (1, 2):
        taken = device.extra_memory(lambda: tuple(x.copy() for _ in range(copies)))  # noqa: B023
        assert abs(taken / x.nbytes - copies) < 0.1


@once
def test_a_short_run_writes_a_table_with_each_candidate(tmp_path):
    process = bench("--quick", "--only", "(8, 64)", "weight", "(64, 1024), r", "--library", "numpy", "--to", tmp_path)
    assert process.returncode == 0
    page, numbers = (tmp_path / "cpu.md").read_text(), json.loads((tmp_path / "cpu.json").read_text())
    head = next(line for line in page.splitlines() if line.startswith("| work |"))
    assert [cell.strip() for cell in head.strip("|").split("|")][1:] == [
        each.name for each in candidates("cpu", ("numpy",))
    ]
    assert set(numbers["machine"]) <= {"processor", "Python", "NumPy", "PyTorch", "JAX", "numba"}
    assert len(numbers["rows"]) == 4
    assert str(Path.home()) not in page
    # the native kernel was not measured, and the figure compares with it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json", "cpu.md"]


@once
def test_a_report_is_read_as_it_was_written_and_old_rows_are_kept(tmp_path):
    new, old = (a_report(title) for title in ("new", "old"))
    report.write(old, tmp_path, figure=False)
    again = report.Report.read(tmp_path / "cpu.json")
    assert again == old
    new.keep(again.rows)
    assert [row.work for row in new.rows] == ["old", "new"]
    new.keep(again.rows)
    assert [row.work for row in new.rows] == ["old", "new"]


@once
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_report_has_every_column_of_its_numbers_also_what_is_no_longer_measured(device):
    found = report.Report.read(FOLDER / f"{device}.json")
    names = {name for row in found.rows for name in row.outcomes}
    assert device == "cpu" or any("compiler=" in name for name in names)
    assert set(found.columns()) == names
    head = next(line for line in report.markdown(found, figure=True).splitlines() if line.startswith("| work |"))
    assert all(name in head for name in names)


@once
def test_what_was_measured_before_ctrl_c_is_written(tmp_path, capsys):
    command = runpy.run_path(str(FOLDER / "__main__.py"))["main"]
    measured = []

    def interrupted(*arguments):
        if measured:
            raise KeyboardInterrupt
        measured.append(measure.measure(*arguments))
        return measured[0]

    command.__globals__["measure"] = interrupted
    asked = ["--quick", "--only", "layer norm", "--library", "numpy", "--to", str(tmp_path)]
    assert command(asked) == 130
    assert "bench: interrupted" in capsys.readouterr().err
    found = report.Report.read(tmp_path / "cpu.json")
    assert [row.work for row in found.rows] == [measured[0].work]


@once
@pytest.mark.filterwarnings("ignore")
def test_the_figure_has_each_candidate_that_has_a_ratio(tmp_path):
    pytest.importorskip("matplotlib", reason="it draws the figure")
    import figure

    assert not figure.draw(a_report("one", to_peer=None), tmp_path / "none.svg")
    assert figure.draw(a_report("one"), tmp_path / "cpu.svg")
    drawing = (tmp_path / "cpu.svg").read_text()
    assert "anynorm, NumPy" in drawing
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.svg"]


@once
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--only", "norms"], "--only must be part of a title, as 'layer norm' or 'gradient', got norms"),
        (["--library", "cupy"], "--library on cpu must have one of numpy, torch, jax, got none of them"),
        (["--dtypes", "float16"], "--dtypes on cpu must be among float32, float64, bfloat16, got float16"),
        (["--seconds", "none"], "must be a number of seconds above 0 and below a day, got none"),
    ],
)
def test_a_bad_argument_is_answered_with_a_sentence(arguments, sentence):
    process = bench(*arguments)
    assert process.returncode == 2
    assert sentence in process.stderr
    assert process.stderr.count("\n") == 1


@pytest.fixture
def libraries(request):
    library = request.config.getoption("--cell").split("-")[0]
    return ("numpy", "torch") if library == "fast" else (library,)  # the cell that has numba


@pytest.fixture
def device(request):
    kind = request.config.getoption("--cell").split("-")[1]
    if kind == "cuda":
        pytest.importorskip("torch", reason="results on a GPU are compared in PyTorch")
    return devices.DEVICES[kind]()


def wide(work):
    """The numbers of a work in float64."""
    return devices.random_arrays(work, np.float64)


def a_report(title, to_peer=2.0):
    outcomes = {PEER: measure.Outcome(ms=1.0, to_peer=1.0 if to_peer else None), "broken": measure.Outcome("why")}
    outcomes["anynorm, NumPy"] = measure.Outcome(ms=2.0, quartiles_ms=[1.5, 2.5], to_peer=to_peer)
    row = measure.Row(title, "layer_norm", (8, 64), False, "float32", 3, outcomes)
    return report.Report("cpu", {"processor": "P", "NumPy": "2"}, False, [row])


def a_row(work, shape, outcomes, norm="layer_norm", gradient=False):
    found = {name: measure.Outcome(**outcome) for name, outcome in outcomes.items()}
    return measure.Row(work, norm, shape, gradient, "float32", 9, found)


def bench(*arguments):
    command = [sys.executable, str(FOLDER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)
