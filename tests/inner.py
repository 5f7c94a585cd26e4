"""All that tests know of the inside of the package: what moves there is a line here.

Tests of an inner module itself import that module; everything else asks for it here.
"""

import sys
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

import anynorm
from anynorm import kernels
from anynorm.arrays import recognize
from anynorm.arrays.library import Library
from anynorm.arrays.numpy import NumpyLibrary
from anynorm.arrays.recognize import library_of
from anynorm.calls import plan
from anynorm.executors import blocks, eager, programs, threads, torch_autograd, whole
from anynorm.executors.blocks import parts
from anynorm.executors.programs import compiled, cpu_run, cuda, cuda_run
from anynorm.kernels import standardizing

share = threads.share
__all__ = ["cuda", "library_of"]


def moves(work):
    """How often a warm call goes from one module of the package to another, or returns to it."""
    files, package = [], str(Path(anynorm.__file__).parent)

    def note(frame, event, _):
        if event in ("call", "return") and frame.f_code.co_filename.startswith(package):
            files.append(frame.f_code.co_filename)

    for _ in range(3):
        work()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return sum(one != other for one, other in pairwise(files))


EXECUTORS = {"whole": whole, "blocks": blocks, "programs": programs}
"""By name; each has `forward` and `backward`, which give None where another is to be asked."""


def count_calls(monkeypatch, name):
    """A list that grows by one for each forward and backward that an executor runs."""
    ran, executor = [], EXECUTORS[name]

    def count(function, *given, **options):
        done = function(*given, **options)
        ran.extend([] if done is None else [name])
        return done

    for what in ("forward", "backward"):
        monkeypatch.setattr(executor, what, partial(count, getattr(executor, what)))
    return ran


def count_scales(monkeypatch):
    """A list that grows by one each time that a power of two is looked for."""
    calls, scale_of = [], standardizing.scale_of
    monkeypatch.setattr(
        standardizing, "scale_of", lambda *given, **options: calls.append(1) or scale_of(*given, **options)
    )
    return calls


def count_programs(monkeypatch):
    """A list of what the programs of a processor were run for."""
    ran, run = [], cpu_run.run

    def noted(plan, what, *arguments, **options):
        done = run(plan, what, *arguments, **options)
        ran.append(what[0] if done is not None else None)
        return done

    monkeypatch.setattr(cpu_run, "run", noted)
    return ran


def forget_programs(monkeypatch):
    """As in a process that has run no program yet; the programs that it has from now on."""
    monkeypatch.setattr(cpu_run, "_known", {})
    monkeypatch.setattr(cpu_run, "_programs", {})
    return cpu_run._programs


def compile_by(monkeypatch, function):
    """Programs are compiled by `function`, which is given what compiles them, their names and their text."""
    make = compiled.function_of
    monkeypatch.setattr(compiled, "function_of", lambda *given: function(make, *given))


def forget_plans(monkeypatch, most=None):
    """As in a process that has run no call yet; the plans that it keeps from now on."""
    monkeypatch.setattr(plan, "_plans", {})
    if most is not None:
        monkeypatch.setattr(plan, "MOST_PLANS", most)
    return plan._plans


def share_everything(monkeypatch):
    """Threads for arrays of any size."""
    monkeypatch.setattr(parts, "SHARED", 1)


def give_buffers(monkeypatch, make):
    """What blocks keep their free buffers in."""
    begin = parts.Workspace.__init__

    def begun(workspace, *given):
        begin(workspace, *given)
        workspace._free = make()

    monkeypatch.setattr(parts.Workspace, "__init__", begun)


def interrupt_when_a_thread_has_started(monkeypatch):
    """As Ctrl-C may."""
    begin = threads._start

    def interrupted(*given):
        begin(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(threads, "_start", interrupted)


def numba_of(monkeypatch, version):
    """As if numba of this version, or none, were installed."""
    monkeypatch.setattr(compiled, "state", lambda: compiled.State(version, ""))


def forget_threads(monkeypatch):
    """As in a process that has started none."""
    monkeypatch.setattr(threads, "_pools", {})


def refuse_other_arrays(monkeypatch, refused):
    """No array of this shape may be made."""

    def refusing(empty):
        def made(library, shape, like, dtype):
            assert shape != refused, "another array was made"
            return empty(library, shape, like, dtype)

        return made

    for kind in (Library, *Library.__subclasses__()):
        if "empty" in vars(kind):
            monkeypatch.setattr(kind, "empty", refusing(kind.empty))


def take_no_memory_of_numpy(monkeypatch):
    """For PyTorch's profiler, which does not see it."""
    monkeypatch.setattr("anynorm.arrays.torch.LARGE", float("inf"))


def record_primitives(monkeypatch):
    """Autograd records each operation, in place of a call as one node."""
    monkeypatch.setattr(torch_autograd, "forward", eager.forward)


def compiled_of_jax(monkeypatch):
    """What is compiled for arrays of JAX from now on."""
    made = {}
    monkeypatch.setattr("anynorm.arrays.jax._compiled", made)
    return made


def derived_in_jax(monkeypatch):
    """The shapes for which a norm of JAX, or its derivative, is traced from now on."""
    shapes = []
    for name in ("standardizer_in_scale", "derivative"):
        kernel = getattr(kernels, name)

        def seen(xp, x, *others, kernel=kernel, **options):
            shapes.append(x.shape)
            return kernel(xp, x, *others, **options)

        monkeypatch.setattr(kernels, name, seen)
    monkeypatch.setattr("anynorm.arrays.jax._differentiated", {})
    return shapes


class Gpu(NumpyLibrary):
    """NumPy as a library with a GPU's programs."""

    programs = "cuda"
    blas_sums = False

    on_host = writable_in_blocks = staticmethod(lambda *arrays: False)
    aligned = staticmethod(lambda x: x.ctypes.data % 16 == 0)


@contextmanager
def emulated_gpu(monkeypatch, launch, splits=None):
    """NumPy as a library with a GPU's programs, run by `launch`; those that were written so far.

    With `splits`, so many blocks of the GPU share a group.
    """
    gpu = Gpu("numpy", library_of("x", np.zeros(1)).xp)
    gpu.launch = launch
    with monkeypatch.context() as patch:
        patch.setitem(recognize._libraries, np.ndarray, gpu)
        for module, cache in ((plan, "_plans"), (cuda_run, "_known"), (cuda_run, "_programs")):
            patch.setattr(module, cache, {})
        if splits is not None:
            patch.setattr(cuda, "splits", lambda groups, length, together: min(splits, length))
        yield cuda_run._programs
