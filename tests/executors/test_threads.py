"""Many threads may call at once, and a call may use several; neither shows in any result."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import inner
import numpy as np
import pytest

import anynorm
from anynorm import settings

pytestmark = pytest.mark.cells("numpy")


@pytest.fixture
def much_to_share(monkeypatch):
    """Threads for arrays of any size."""
    inner.share_everything(monkeypatch)


def python(code, **environment):
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def jobs(seed):
    """Calls of every kind, and what each gives."""
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, 6, 8, 5 + seed % 3, 4)).astype(rng.choice([np.float32, np.float64]))
    gamma = rng.standard_normal(8).astype(x.dtype)
    running = anynorm.RunningStats.init(8, like=x)
    return [
        lambda: (anynorm.batch_norm(x, gamma),),
        lambda: (anynorm.layer_norm(x, axis=(1, 2, 3), out=x.copy()),),
        lambda: anynorm.vjp(anynorm.group_norm, x, gamma, groups=4)[1](dy),
        lambda: anynorm.vjp(anynorm.batch_norm, x, gamma)[1](dy),
        lambda: (anynorm.weight_norm(x, np.ones(6)), anynorm.moments(x, axis=(0, 2)).var),
        lambda: (running.update(anynorm.moments(x, axis=(0, 2, 3))).mean, anynorm.rms_norm(x, axis=None)),
    ]


def test_many_threads_may_call_at_once(monkeypatch, much_to_share):
    inner.forget_plans(monkeypatch, most=3)
    work = [job for seed in range(2) for job in jobs(seed)]
    blocks = [(64, 1), (256, 2), (4096, 3), (2**22, 2)]

    def run(job, block_bytes, threads):
        with anynorm.options(block_bytes=block_bytes, threads=threads):
            return job()

    want = {(i, block): run(work[i], *blocks[block]) for i in range(len(work)) for block in range(len(blocks))}
    wrong = []

    def user(seed):
        rng = np.random.default_rng(seed)
        for _ in range(12):
            i, block = int(rng.integers(len(work))), int(rng.integers(len(blocks)))
            try:
                for found, each in zip(run(work[i], *blocks[block]), want[i, block], strict=True):
                    np.testing.assert_array_equal(found, each)
            except BaseException as error:
                wrong.append((i, block, error))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        users = [threading.Thread(target=user, args=(seed,)) for seed in range(6)]
        for each in users:
            each.start()
        for each in users:
            each.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_the_number_of_threads_does_not_show_in_a_bit(much_to_share):
    for seed in range(2):
        for job in jobs(seed):
            found = []
            for threads in (1, 2, 3):
                with anynorm.options(threads=threads, block_bytes=200):
                    found.append(job())
            for others in found[1:]:
                for one, other in zip(found[0], others, strict=True):
                    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("norm", [anynorm.batch_norm, anynorm.layer_norm])
def test_another_thread_may_take_the_room_that_this_one_saw(norm, monkeypatch):
    class Taken(list):
        """Which has something until it is asked for it, as between two threads that no lock holds apart."""

        def __len__(self):
            return 1

    inner.give_buffers(monkeypatch, Taken)
    x = np.random.default_rng(0).standard_normal((40, 6, 30)).astype(np.float16)
    with anynorm.options(block_bytes=256):
        np.testing.assert_allclose(norm(x), norm(x.astype(np.float64)), atol=5e-3)


def test_options_are_those_of_a_task_alone():
    async def task(n):
        with anynorm.options(threads=n):
            for _ in range(3):
                await asyncio.sleep(0)
                assert settings.current().threads == n
                with anynorm.options(block_bytes=n):
                    await asyncio.sleep(0)
                    assert settings.current()[1:] == (n, n)
        assert settings.current() == outside

    async def tasks():
        await asyncio.gather(*(task(n) for n in range(1, 9)))

    outside = settings.current()
    asyncio.run(tasks())
    seen = []
    with anynorm.options(threads=7):
        other = threading.Thread(target=lambda: seen.append(settings.current()))
        other.start()
        other.join()
    assert seen == [outside]


@pytest.mark.parametrize(
    ("named", "error"),
    [({"threads": 0}, ValueError), ({"block_bytes": -1}, ValueError), ({"threads": 1.5}, TypeError)],
)
def test_options_are_refused_where_they_are_named(named, error):
    with pytest.raises(error, match=f"^{next(iter(named))} must be "):
        anynorm.options(**named)


def test_options_may_be_entered_again_and_in_themselves():
    outside, three = settings.current(), anynorm.options(threads=3)
    for _ in range(2):
        with three:
            assert settings.current().threads == 3
            with anynorm.options(threads=5, block_bytes=64), three:
                assert settings.current()[1:] == (3, 64)
                with pytest.raises(KeyError), three:
                    raise KeyError
                assert settings.current()[1:] == (3, 64)
            assert settings.current() == outside._replace(threads=3)
        assert settings.current() == outside

    @three
    def decorated(depth):
        assert settings.current().threads == 3
        return depth and decorated(depth - 1)

    assert decorated(3) == 0
    assert settings.current() == outside


def test_one_options_object_serves_threads_tasks_and_generators_at_once():
    outside, shared, seen = settings.current(), anynorm.options(threads=3), []

    def use():
        for _ in range(200):
            with shared:
                seen.append(settings.current().threads)
            seen.append(settings.current() == outside)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (seen.count(3), seen.count(True), len(seen)) == (800, 800, 1600)

    async def task(n):
        for _ in range(n):
            with shared:
                await asyncio.sleep(0)
                assert settings.current().threads == 3
            await asyncio.sleep(0)
            assert settings.current() == outside

    async def tasks():
        await asyncio.gather(*(task(n) for n in range(1, 9)))

    asyncio.run(tasks())

    def generator(n):
        with anynorm.options(threads=n):
            yield
            yield

    first, second = generator(5), generator(6)
    next(first)
    next(second)
    first.close()
    assert settings.current().threads == 6
    second.close()
    assert settings.current() == outside


@pytest.mark.parametrize("bad", [0, 1, 7, 19])
def test_an_exception_in_any_thread_is_raised_once_all_have_stopped(bad):
    working = []

    def work(i):
        working.append(i)
        try:
            time.sleep(0.002)
            if i >= bad:
                raise ZeroDivisionError(i)
        finally:
            working.remove(i)

    for _ in range(5):
        with pytest.raises(ZeroDivisionError):
            inner.share(work, range(20), 4)
        assert not working
    assert inner.share(lambda i: i * i, range(20), 4) == [i * i for i in range(20)]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no such timer")
def test_an_interrupt_is_raised_once_nobody_writes_any_more():
    begun, done = threading.Event(), []

    def work(i):
        if threading.current_thread() is threading.main_thread():
            begun.wait()
        else:
            begun.set()
            time.sleep(0.3)
            done.append(i)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            inner.share(work, range(2), 2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(done) == 1


def test_an_interrupt_while_a_thread_is_started_leaves_it_nothing_to_do(monkeypatch):
    done = []
    inner.interrupt_when_a_thread_has_started(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        inner.share(lambda i: time.sleep(0.001) or done.append(i), range(200), 2)
    found = len(done)
    time.sleep(0.05)
    assert len(done) == found < 200


def test_a_failure_leaves_nothing_more_to_do():
    done = []

    def work(i):
        if threading.current_thread() is not threading.main_thread():
            raise ZeroDivisionError
        time.sleep(0.01)
        done.append(i)

    with pytest.raises(ZeroDivisionError):
        inner.share(work, range(100), 2)
    assert len(done) < 50


def test_no_room_for_a_thread_leaves_the_work_to_this_one(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    inner.forget_threads(monkeypatch)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert inner.share(lambda i: -i, range(9), 3) == [-i for i in range(9)]


def test_nan_in_a_cotangent_warns_in_no_thread(much_to_share):
    x, dy = np.random.default_rng(0).standard_normal((2, 40, 6, 30))
    dy[3, 2, 1], dy[4, 2, 1] = np.inf, -np.inf
    with anynorm.options(threads=3, block_bytes=256):
        dx, dgamma = anynorm.vjp(anynorm.batch_norm, x, np.ones(6))[1](dy)
    assert np.isnan(dx[:, 2]).all()
    assert np.isfinite(np.delete(dx, 2, axis=1)).all()
    assert list(np.isfinite(dgamma)) == [True, True, False, True, True, True]


def test_a_fork_is_safe_in_child_and_parent():
    done = python(
        """
import os, warnings
import numpy as np, anynorm
warnings.simplefilter("ignore")
x = np.random.default_rng(0).standard_normal((256, 8192))
with anynorm.options(threads=3):
    want = anynorm.layer_norm(x)
    child = os.fork()
    assert (anynorm.layer_norm(x) == want).all()
    if not child:
        os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_started_that_is_not_needed():
    done = python(
        """
import sys, threading
import numpy as np
def alone(): return threading.active_count() == 1 and "concurrent.futures.thread" not in sys.modules
import anynorm
assert alone()
anynorm.vjp(anynorm.batch_norm, np.ones((8, 16, 32)))[1](np.ones((8, 16, 32)))
assert alone()
large = np.ones((64, 2**17), np.float32)
with anynorm.options(threads=1):
    anynorm.vjp(anynorm.batch_norm, large)[1](large)
    anynorm.layer_norm(large)
assert alone()
with anynorm.options(threads=2):
    anynorm.layer_norm(large)
assert threading.active_count() == 2
""",
        ANYNORM_NUM_THREADS="3",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("before", ["", "anynorm.layer_norm(x)"])
def test_a_call_at_exit_works(before):
    done = python(
        f"""
import atexit
import numpy as np, anynorm
x = np.ones((64, 2**16))
{before}
atexit.register(lambda: print(anynorm.layer_norm(x).sum()))
""",
        ANYNORM_NUM_THREADS="3",
        ANYNORM_ENGINE="auto",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.0\n", "")


@pytest.mark.parametrize("value", ["abc", "0"])
def test_a_wrong_number_of_threads_in_the_environment_is_named(value):
    done = python("import numpy, anynorm; anynorm.layer_norm(numpy.ones(3))", ANYNORM_NUM_THREADS=value)
    last = done.stderr.splitlines()[-1] if done.stderr else ""
    assert not last or f"ANYNORM_NUM_THREADS must be a whole number of at least 1, got '{value}'" in last
    done = python("import numpy, anynorm; anynorm.layer_norm(numpy.ones(2**20))", ANYNORM_NUM_THREADS=value)
    assert f"ANYNORM_NUM_THREADS must be a whole number of at least 1, got '{value}'" in done.stderr.splitlines()[-1]
