"""The command line, from outside; and the demonstration's network, whose gradients are the differences of its losses.

The tests of the `demo` extra are skipped where it is not installed; with ANYNORM_DEMO=1 in the environment, they fail.
"""

import importlib
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import inner
import numpy as np
import pytest
from oracles import only_if

import anynorm
from anynorm import cli
from anynorm.demo import claims, digits, layers, plot
from anynorm.demo.backends import open_backend
from anynorm.demo.network import METHODS, STAGES, forward, initial_layers, initial_running
from anynorm.demo.training import History, Run, Trainer

XP = inner.library_of("x", np.zeros(1)).xp

once = pytest.mark.cells("numpy")
of_one_demonstration = pytest.mark.xdist_group("demonstration")
in_every_library = pytest.mark.cells("numpy", "strict", "torch", "jax", "cupy")
on_every_backend = pytest.mark.cells("numpy", "torch", "jax", "cupy")


def anynorm_(*arguments, before="pass", **options):
    """`anynorm` with these arguments in a process of its own, in which the statement `before` was run."""
    code = f"import sys; {before}; from anynorm.cli import main; sys.exit(main({list(map(str, arguments))}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **options)


def need(*packages):
    for package in packages:
        with warnings.catch_warnings(action="ignore"):  # what one package deprecates of another is no business of ours
            if os.environ.get("ANYNORM_DEMO") == "1":
                importlib.import_module(package)
            else:
                pytest.importorskip(package, reason=f"the extra `demo` is not installed: there is no {package}")


@pytest.fixture
def rich():
    need("rich")


@pytest.fixture(scope="module")
def extra():
    need("rich", "matplotlib", "sklearn")


@pytest.fixture(scope="module")
def done(extra, tmp_path_factory):
    """A short demonstration that has come to its end, and its figure."""
    figure = tmp_path_factory.mktemp("demo") / "curves.png"
    return anynorm_("demo", "--epochs", 1, "--batch-size", 64, "--seed", 3, "--plot", figure), figure


@of_one_demonstration
@once
def test_the_demonstration_ends_well_and_prints_no_control_codes_to_a_file(done):
    process, _ = done
    assert (process.returncode, process.stderr) == (0, "")
    assert "\x1b" not in process.stdout
    assert "\r" not in process.stdout
    assert not [line for line in process.stdout.splitlines() if line != line.rstrip()]


@of_one_demonstration
@once
def test_the_demonstration_has_a_row_for_each_network(done):
    process, _ = done
    for method in METHODS.values():
        row = re.search(rf"{method.title}\W+(\S+)\W+(\S+)%\W+(\S+)\W+(\S+)", process.stdout)
        assert row, method.title
        loss, accuracy, epochs, seconds = row.groups()
        assert 0 < float(loss) < 3
        assert 5 < float(accuracy) <= 100
        assert epochs in ("1", "never")
        assert 0 <= float(seconds) < 100


@of_one_demonstration
@once
def test_the_demonstration_says_of_each_claim_whether_it_was_seen(done):
    process, _ = done
    for check in claims.experiments(0, 1):
        assert re.search(rf"{check.claim}:\s(seen|seen in part|not seen)\.\n", process.stdout)


@of_one_demonstration
@once
def test_the_demonstration_leaves_one_png_and_nothing_else(done):
    _, figure = done
    assert list(figure.parent.iterdir()) == [figure]
    content = figure.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    assert int.from_bytes(content[16:20]) >= 1000


@of_one_demonstration
@once
@pytest.mark.filterwarnings("ignore")
def test_nothing_of_the_figure_is_cut_off(done):
    from matplotlib.image import imread

    image = imread(done[1])[..., :3]
    assert image.min() < 0.5
    for border in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
        assert np.all(border == 1)


@once
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("extra")
def test_a_figure_that_is_interrupted_leaves_the_old_one(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    figure = tmp_path / "curves.png"
    figure.write_text("old")
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plot.save({"BN": History(((1.0, 0.5),), (0.9,), 1.0)}, "title", figure)
    assert list(tmp_path.iterdir()) == [figure]
    assert figure.read_text() == "old"


HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
"""A process that was started in the background is deaf to Ctrl-C, and so are those that it starts."""


@once
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminal to show the bar on")
@pytest.mark.usefixtures("extra")
def test_ctrl_c_ends_the_bar_and_says_one_line(tmp_path):
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", HEARS + "import sys; from anynorm.cli import main; sys.exit(main(['demo']))"],
        cwd=tmp_path,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    shown = b""
    while b"Training batch norm" not in shown:
        shown += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    while chunk := _read(ours):
        shown += chunk
    os.close(ours)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"anynorm demo: interrupted\n")
    assert shown.index(b"\x1b[?25l") < shown.index(b"\x1b[?25h"), "the cursor is back"
    assert not list(tmp_path.iterdir())


def _read(terminal):
    """What a process has printed; nothing after its end, which Linux reports as an error."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


@once
@pytest.mark.parametrize(
    ("command", "blocked", "named", "packages"),
    [
        (
            "demo",
            ["rich", "matplotlib", "sklearn"],
            "rich, matplotlib and scikit-learn",
            "rich matplotlib scikit-learn",
        ),
        ("info", ["rich"], "rich", "rich"),
    ],
)
def test_a_missing_extra_is_one_sentence_that_says_what_to_install(command, blocked, named, packages, tmp_path):
    process = anynorm_(command, before=f"sys.modules.update(dict.fromkeys({blocked}))", cwd=tmp_path)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f"anynorm {command}: install {named} first: pip install {packages}\n"
    assert not list(tmp_path.iterdir())


@once
@pytest.mark.usefixtures("extra")
def test_one_missing_package_of_the_extra_is_named_alone():
    process = anynorm_("demo", before="sys.modules['sklearn'] = None")
    assert process.stderr == "anynorm demo: install scikit-learn first: pip install scikit-learn\n"


@once
@pytest.mark.parametrize(("name", "package"), [("torch", "torch"), ("cupy", "cupy-cuda13x")])
@pytest.mark.usefixtures("extra")
def test_a_missing_backend_is_one_sentence_that_says_what_to_install(name, package):
    process = anynorm_("demo", "--backend", name, before=f"sys.modules['{name}'] = None")
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f"anynorm demo: install {name} first: pip install {package}\n"


@once
@pytest.mark.usefixtures("extra")
def test_a_broken_backend_is_one_sentence(tmp_path):
    _break("cupy", tmp_path)
    process = anynorm_("demo", "--backend", "cupy", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == "anynorm demo: cupy is installed but does not import: no driver\n"


def _break(library, folder):
    (folder / f"{library}.py").write_text("raise OSError('no driver\\nand more of it')")


@once
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got 0"),
        (["--epochs", "ten"], "argument --epochs: must be a whole number of at least 1, got ten"),
        (["--seed", "-1"], "argument --seed: must be a whole number of at least 0, got -1"),
        (["--batch-size", "1438"], "argument --batch-size: must be a whole number from 1 to 1437, got 1438"),
        (["--learning-rate", "0"], "argument --learning-rate: must be a finite number above 0, got 0"),
        (["--learning-rate", "inf"], "argument --learning-rate: must be a finite number above 0, got inf"),
        (["--learning-rate", "fast"], "argument --learning-rate: must be a finite number above 0, got fast"),
    ],
)
def test_a_bad_option_is_one_sentence(options, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", *options])
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", f"anynorm demo: {sentence}\n")


@once
@pytest.mark.parametrize("arguments", [["demo", "--backend", "lisp"], ["demo", "--speed", "9"], ["dance"]])
def test_what_there_is_not_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    output, errors = capsys.readouterr()
    assert (stopped.value.code, output, errors.count("\n")) == (2, "", 1)


@once
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--device", "cuda:99"], "--device must be one of cpu for numpy, got cuda:99"),
        (["--plot", "curves.svg"], "--plot must end in .png, got curves.svg"),
        (["--plot", "nowhere/curves.png"], "--plot must be in a folder that exists, got nowhere/curves.png"),
        (["--plot", "folder.png"], "--plot must name a file, got the folder folder.png"),
    ],
)
@pytest.mark.usefixtures("extra")
def test_what_cannot_be_done_is_one_sentence_before_any_training(options, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert cli.main(["demo", *options]) == 2
    assert capsys.readouterr() == ("", f"anynorm demo: {sentence}\n")


@once
@pytest.mark.usefixtures("extra")
def test_plot_is_not_named_to_those_who_did_not_give_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.os, "access", lambda path, mode: False)  # root may write anywhere
    said = "must be in a folder that can be written to, got"
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == f"anynorm demo: without --plot, anynorm-demo.png {said} {tmp_path}\n"
    assert cli.main(["demo", "--plot", "mine.png"]) == 2
    assert capsys.readouterr().err == f"anynorm demo: --plot {said} mine.png\n"


@once
def test_without_a_command_there_is_help(capsys):
    assert cli.main([]) == 0
    output, _ = capsys.readouterr()
    assert "demo" in output
    assert "info" in output


@once
def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert (stopped.value.code, capsys.readouterr().out) == (0, f"anynorm {anynorm.__version__}\n")


@once
@pytest.mark.usefixtures("extra")
def test_a_figure_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device", "curves.png")

    monkeypatch.setattr(plot, "save", full)
    assert cli.main(["demo", "--epochs", "1", "--plot", str(tmp_path / "curves.png")]) == 1
    assert capsys.readouterr().err == "anynorm demo: cannot write curves.png: No space left on device\n"


@once
@pytest.mark.usefixtures("rich")
def test_info_lists_what_is_there_what_is_not_and_what_is_broken(tmp_path):
    _break("cupy", tmp_path)
    process = anynorm_("info", before="sys.modules['torch'] = None", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (process.returncode, process.stderr) == (0, "")
    rows = [re.split(r"\s*[│|]\s*", line)[1:4] for line in process.stdout.splitlines() if line[:1] in "│|"]
    known = {name: (device, dtypes) for name, device, dtypes in rows if name}
    device, dtypes = known[f"numpy {np.__version__}"]
    assert device == "cpu"
    assert {"float16", "float32", "float64"} <= set(dtypes.split(", "))
    assert known["torch"] == ("not installed", "")
    (broken,) = [value for name, value in known.items() if name.startswith("cupy")]
    assert broken == ("broken", "no driver")


@pytest.mark.untracked
@on_every_backend
@pytest.mark.parametrize("method", METHODS)
def test_every_backend_trains_as_numpy_does(backend, method):
    only_if([*METHODS].index(method) % 3 == 0, backend, "jax")
    device = {"jax": "cpu:1", "cupy": "cuda:0"}.get(backend.library, str(backend.device))
    run = Run(method, seed=1, learning_rate=0.05, batch_size=479, epochs=1)
    found = Trainer(open_backend(backend.library, device), _made_up_digits()).train(run)
    expected = Trainer(open_backend("numpy", None), _made_up_digits()).train(run)
    assert [len(each) for each in found.losses] == [3]
    np.testing.assert_allclose(found.losses, expected.losses, rtol=2e-3)
    np.testing.assert_allclose(found.accuracies, expected.accuracies, atol=0.02)


@once
@pytest.mark.parametrize(
    ("version", "asked", "engine"), [("0.61", "auto", "numba"), (None, "auto", "auto"), ("0.61", "arrays", "arrays")]
)
def test_the_demonstration_is_computed_by_programs_where_there_are_any(monkeypatch, version, asked, engine):
    inner.numba_of(monkeypatch, version)
    with anynorm.options(engine=asked):
        assert open_backend("numpy", None).engine == engine


def _made_up_digits():
    random = np.random.default_rng(0)
    labels = random.integers(10, size=digits.TRAINED + digits.TESTED)
    images = random.standard_normal((10, 8, 8, 1))[labels] + random.standard_normal((labels.size, 8, 8, 1))
    labels, images = np.eye(10, dtype=np.float32)[labels], images.astype(np.float32)
    cut = digits.TRAINED
    return digits.Digits(images[:cut], labels[:cut], images[cut:], labels[cut:])


@once
def test_a_seed_trains_the_same_network_again_and_another_seed_another():
    trainer = Trainer(open_backend("numpy", "cpu"), _made_up_digits())
    first, again, other = (trainer.train(Run("GN", seed, 0.05, 359, 1)) for seed in (1, 1, 2))
    assert first.losses == again.losses != other.losses
    assert first.losses[0][-1] < first.losses[0][0]


@once
def test_a_run_stops_at_its_target_and_reports_all_its_steps():
    done = []
    run = Run("BN", seed=1, learning_rate=0.05, batch_size=32, epochs=9, target=1.5)
    history = Trainer(open_backend("numpy", None), _made_up_digits()).train(run, done.append)
    assert len(history.losses) == len(history.accuracies) < run.epochs
    assert history.steps_to(1.5) <= len(history.losses) * run.batches
    assert sum(done) == run.steps


@once
def test_a_history_knows_when_it_got_there():
    history = History(((2.0,) * 30, (1.0,) * 30), (0.4, 0.6), 1.0)
    assert history.epoch_losses == [2.0, 1.0]
    assert [history.epochs_to(each) for each in (0.3, 0.5, 0.7)] == [1, 2, None]
    assert [history.steps_to(each) for each in (2.1, 1.48, 1.01, 0.5)] == [20, 41, 50, None]
    assert History(((1.0,) * 19,), (0.5,), 1.0).steps_to(1.0) is None


GOOD, EVEN, POOR = (0.089, 0.9), (0.98, 0.97), (0.1, 0.1)


@once
@pytest.mark.parametrize(
    ("seeds", "verdict"),
    [
        ([GOOD, GOOD, GOOD], "seen"),  # 0.9 alone is no boundary, nor is a plain network that stalls at 0.503
        ([(0.503, 0.983), (0.499, 0.983), (0.501, 0.9)], "seen"),
        ([EVEN, GOOD, GOOD], "seen"),
        ([EVEN, GOOD, POOR], "seen in part"),
        ([EVEN, EVEN, POOR], "not seen"),
        ([(0.9, 0.1), (0.9, 0.1), (0.9, 0.1)], "not seen"),
    ],
)
def test_the_verdict_on_large_rates_follows_from_the_gaps(seeds, verdict):
    found = _judged(0, seeds)
    ahead = sum(bn - plain > 0.25 for plain, bn in seeds)
    assert found.verdict == verdict
    assert f"by more than 25 points on {ahead} of 3 seeds" in found.evidence
    assert all(f"{each:.1%}" in found.evidence for pair in seeds for each in pair)


@once
@pytest.mark.parametrize(
    ("seeds", "verdict"),
    [
        ([[0.97, 0.96, 0.98, 0.7]] * 3, "seen"),
        ([[0.97, 0.97, 0.98, 0.98], [0.97, 0.96, 0.98, 0.7], [0.85, 0.94, 0.94, 0.64]], "seen"),
        ([[0.97, 0.97, 0.98, 0.98], [0.97, 0.96, 0.98, 0.7], [0.97, 0.97, 0.98, 0.98]], "seen in part"),
        ([[0.97, 0.90, 0.98, 0.7]] * 3, "seen in part"),
        ([[0.97, 0.97, 0.98, 0.98]] * 3, "not seen"),
        ([[0.97, 0.60, 0.98, 0.7]] * 3, "not seen"),
    ],
)
def test_the_verdict_on_small_batches_follows_from_the_gaps(seeds, verdict):
    found = _judged(1, seeds)
    assert found.verdict == verdict
    assert all(f"{each:.1%}" in found.evidence for seed in seeds for each in seed)


@once
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("places", range(1, 4))
def test_a_verdict_does_not_turn_on_one_digit_of_one_seed(index, places):
    seeds = [[(0.089, 0.9)] * 3, [[0.85, 0.93, 0.94, 0.64]] * 3][index]
    near = [[each + places / 360 * way for each in seeds[0]] for way in (-1, 1)]
    assert {_judged(index, [one, *seeds[1:]]).verdict for one in near} == {"seen"}


def _judged(index, seeds):
    """What an experiment finds of the last accuracies of the runs of each seed, in their order."""
    check = claims.experiments(0, 9)[index]
    assert len({run.seed for run in check.runs}) == len(seeds)
    assert [run.seed for run in check.runs] == [seed for seed, runs in enumerate(seeds) for _ in runs]
    return check.judge([History(((1.0,),), (each,)) for seed in seeds for each in seed])


NEVER = [None] * 4


@once
@pytest.mark.parametrize(
    ("plain", "wn", "verdict"),
    [
        ([80, 60, 70, None], [60, 50, 60, 90], "seen"),
        ([80, 60, 70, None], [90, 70, 71, 90], "seen in part"),
        ([80, 60, 70, None], [80, 60, 70, None], "not seen"),
        (NEVER, NEVER, "not seen"),
    ],
)
def test_the_verdict_on_steps_follows_from_the_numbers(plain, wn, verdict):
    check = claims.experiments(0, 9)[2]
    assert len(check.runs) == 8 * claims.REPEATS
    found = check.judge([_there_after(steps) for steps in (*plain, *wn) for _ in range(claims.REPEATS)])
    assert found.verdict == verdict
    for rate, without, weights in zip(claims.RATES, plain, wn, strict=True):
        texts = ["not in every run" if each is None else str(each) for each in (without, weights)]
        assert f"{rate:g}: plain {texts[0]}, WN {texts[1]}" in found.evidence


@once
@pytest.mark.parametrize(("faster", "verdict"), [(3, "seen"), (2, "seen"), (1, "seen in part"), (0, "not seen")])
def test_a_claim_of_fewer_steps_is_seen_if_it_is_on_most_seeds(faster, verdict):
    check = claims.experiments(0, 9)[2]
    plain = [_there_after(80)] * 12
    wn = [_there_after(50 if seed < faster else 100) for _ in claims.RATES for seed in range(3)]
    found = check.judge([*plain, *wn])
    assert found.verdict == verdict
    assert f"on {faster} of 3 seeds: plain 80, 80, 80, WN " in found.evidence


def _there_after(steps):
    """A history whose mean loss over 20 steps is low for the first time after `steps`."""
    if steps is None:
        return History(((9.0,) * 100,), (0.5,))
    return History(((9.0,) * (steps - 20) + (0.0,) * 20,), (0.5,))


@once
def test_the_runs_that_a_claim_compares_differ_in_nothing_but_the_method():
    for check, pair in zip(claims.experiments(5, 9), (("plain", "BN"), ("GN", "BN"), ("plain", "WN")), strict=True):
        first, second = ([run._replace(method="") for run in check.runs if run.method == name] for name in pair)
        assert first == second


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def convolved(x, weight):
    """A 3x3 convolution, number by number."""
    n, height, width, channels = x.shape
    kernels = weight.reshape(3, 3, channels, -1)
    y = np.zeros((n, height, width, kernels.shape[-1]))
    for sample, row, column, i, j in np.ndindex(n, height, width, 3, 3):
        if 0 <= row + i - 1 < height and 0 <= column + j - 1 < width:
            y[sample, row, column] += x[sample, row + i - 1, column + j - 1] @ kernels[i, j]
    return y


def averaged(x):
    """Every 2x2 pixels, number by number."""
    y = np.zeros((x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3]))
    for sample, row, column in np.ndindex(y.shape[:3]):
        y[sample, row, column] = x[sample, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(axis=(0, 1))
    return y


def entropy(logits, labels):
    """The mean cross-entropy, sample by sample."""
    exponentials = np.exp(logits)
    return np.asarray(
        np.mean([-np.log(e[label == 1][0] / e.sum()) for e, label in zip(exponentials, labels, strict=True)])
    )


LAYERS = {
    "conv3x3": (layers.conv3x3, convolved, [normal(2, 4, 6, 3), normal(27, 5)]),
    "dense": (
        layers.dense,
        lambda x, weight: (x.reshape(len(x), -1) @ weight)[:, None, None, :],
        [normal(3, 2, 2, 4), normal(16, 5)],
    ),
    "shift": (layers.shift, lambda x, by: x + by, [normal(3, 2, 2, 4), normal(1, 1, 1, 4)]),
    "relu": (layers.relu, lambda x: np.clip(x, 0, None), [normal(3, 2, 2, 4)]),
    "pool2x2": (layers.pool2x2, averaged, [normal(3, 4, 6, 2)]),
}


@in_every_library
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_formula_and_its_pullback_the_differences_of_it(backend, name):
    layer, formula, arguments = LAYERS[name]
    arrays = [backend.array(each) for each in arguments]
    xp = inner.library_of("x", arrays[0]).xp
    y, pullback = layer(xp, *arrays)
    backend.check(y, formula(*arguments))
    dy = normal(*y.shape, seed=1)
    found = pullback(backend.array(dy))
    for position, gradient in enumerate(found if len(arguments) > 1 else [found]):
        expected = differences(formula, arguments, position, dy)
        backend.check(gradient, expected, tolerance=max(backend.tolerance, 1e-8))


@in_every_library
def test_cross_entropy_is_its_formula_and_its_pullback_the_differences_of_it(backend):
    logits, labels = normal(4, 10), np.eye(10)[[3, 0, 9, 3]]
    array = backend.array(logits)
    loss, pullback = layers.cross_entropy(inner.library_of("x", array).xp, array, backend.array(labels))
    backend.check(loss, entropy(logits, labels))
    expected = differences(entropy, [logits, labels], 0, np.asarray(2.0))
    backend.check(pullback(2.0), expected, tolerance=max(backend.tolerance, 1e-8))


def differences(function, arguments, position, dy):
    """The gradient of sum(function(*arguments) * dy) to one argument, by central differences."""
    gradient = np.zeros_like(arguments[position])
    for index in np.ndindex(gradient.shape):
        sums = []
        for step in (1e-5, -1e-5):
            moved = [each.copy() for each in arguments]
            moved[position][index] += step
            sums.append((function(*moved) * dy).sum())
        gradient[index] = (sums[0] - sums[1]) / 2e-5
    return gradient


@once
def test_cross_entropy_of_huge_logits_is_finite():
    loss, pullback = layers.cross_entropy(
        XP, np.asarray([[1e4, 0.0], [0.0, 1e4]]), np.asarray([[1.0, 0.0], [1.0, 0.0]])
    )
    assert loss == 5e3
    np.testing.assert_array_equal(pullback(1.0), [[0, 0], [-0.5, 0.5]])


def network(method, seed=0):
    """A network in float64, no number of which is 0 or 1 by chance."""
    start = initial_layers(METHODS[method], lambda x: x.astype(np.float64), seed)
    return tuple(
        type(layer)(*(part if part is None else part + 0.1 * normal(*part.shape, seed=seed) for part in layer))
        for layer in start
    )


@once
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_the_whole_network_is_the_slope_of_its_loss(method):
    images, labels, start = normal(5, 8, 8, 1), np.eye(10)[[3, 1, 4, 1, 5]], network(method)

    def loss_and_pullbacks(parameters):
        logits, _, network_pullback = forward(XP, METHODS[method], parameters, images)
        loss, loss_pullback = layers.cross_entropy(XP, logits, labels)
        return float(loss), lambda: network_pullback(loss_pullback(1.0))

    gradients = loss_and_pullbacks(start)[1]()
    for place, layer in enumerate(start):
        for field, part in layer._asdict().items():
            gradient = getattr(gradients[place], field)
            if part is None:
                assert gradient is None
                continue
            assert gradient.shape == part.shape
            for seed in range(3):
                direction = normal(*part.shape, seed=seed)
                losses = [
                    loss_and_pullbacks(
                        (*start[:place], layer._replace(**{field: part + step * direction}), *start[place + 1 :])
                    )[0]
                    for step in (1e-8, -1e-8)
                ]
                slope = (losses[0] - losses[1]) / 2e-8
                np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-5, atol=1e-6)


@once
@pytest.mark.parametrize("method", METHODS)
def test_at_inference_an_image_is_read_alike_whatever_its_company(method):
    start = network(method)
    running = initial_running(METHODS[method], start)
    of_the_batch = method in ("BN", "WN+MBN")
    assert (running[0] is not None) == of_the_batch
    images = normal(5, 8, 8, 1)
    together, _, _ = forward(XP, METHODS[method], start, images, running)
    alone, _, _ = forward(XP, METHODS[method], start, images[:1], running)
    np.testing.assert_allclose(together[:1], alone, rtol=1e-12)
    trained, _, _ = forward(XP, METHODS[method], start, images)
    assert (np.abs(trained - together).max() > 1e-3) == of_the_batch


@once
@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_the_same_weights(method):
    plain, normed = (initial_layers(METHODS[name], np.asarray, 7) for name in ("plain", method))
    for stage, one, other in zip(STAGES, plain, normed, strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)
        assert one.weight.dtype == np.float32
        weighed = METHODS[method].weights
        scaled = weighed or (
            METHODS[method].norm is not None and not stage.last and not (method == "IN" and not stage.pooled)
        )
        assert (other.scale is not None) == scaled
        if weighed:
            np.testing.assert_allclose(anynorm.weight_norm(other.weight, other.scale, axis=1), one.weight, rtol=1e-6)


@once
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("extra")
def test_the_digits_are_those_of_scikit_learn():
    found = digits.load()
    assert found.train_images.shape == (digits.TRAINED, 8, 8, 1)
    assert found.test_images.shape == (digits.TESTED, 8, 8, 1)
    assert {each.dtype for each in found} == {np.dtype(np.float32)}
    np.testing.assert_allclose([found.train_images.mean(), found.train_images.std()], [0, 1], atol=1e-5)
    labels = np.concatenate([found.train_labels, found.test_labels])
    np.testing.assert_array_equal(labels.sum(axis=1), 1)
    assert labels.sum(axis=0).min() > 170
