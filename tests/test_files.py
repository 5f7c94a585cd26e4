"""Files of state: what went in comes out, or a sentence says why not; and what was there is never lost."""

import copy
import hashlib
import io
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

import anynorm
from anynorm import files

SUFFIXES = [".npz", ".safetensors"]


def numbers(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape) ** 2


def states(backend, dtype=None):
    """One of each kind, by name."""
    mean, var, v = (backend.array(each, dtype) for each in (numbers(3), numbers(3) + 1, numbers(4, 3)))
    exact = anynorm.RunningStats(mean, var, 7, momentum=None, correction=1)
    return {
        "moments": anynorm.Moments(mean, var, 5),
        "running/stats": anynorm.RunningStats(mean, var, 2.5, momentum=0.75, correction=1),
        "exact": exact.merge(anynorm.RunningStats(var, mean, 3, momentum=None, correction=1)),
        "weight é": anynorm.WeightNorm(v, backend.array(numbers(4), dtype), axis=0),
        "file": anynorm.WeightNorm(v, backend.array(1.5, dtype), axis=None),
        "both": anynorm.WeightNorm(v, backend.array(numbers(4, 3), dtype), axis=(0, 1)),
    }


def arrays_of(state):
    names = ("v", "g") if isinstance(state, anynorm.WeightNorm) else ("mean", "var", "_rest")
    return {name: x for name in names if (x := getattr(state, name)) is not None}


def conventions_of(state):
    names = ("axis",) if isinstance(state, anynorm.WeightNorm) else ("count", "momentum", "correction")
    return [(type(x), x) for name in names if not hasattr(x := getattr(state, name, None), "shape")]


def check_same(backend, found, expected, dtype=None):
    assert type(found) is type(expected)
    assert conventions_of(found) == conventions_of(expected)
    assert arrays_of(found).keys() == arrays_of(expected).keys()
    for name, x in arrays_of(expected).items():
        backend.check(arrays_of(found)[name], backend.numpy(x), dtype=dtype, tolerance=0)


def tampered(path, change):
    """Write the file anew, whole and with its checksum, after a change to its text and its arrays."""
    made = files._FORMATS[path.suffix]
    text, arrays = made.decode(path.read_bytes())
    content = json.loads(text)
    change(content, arrays)
    path.write_bytes(sealed(made.encode(arrays, json.dumps(content)), path.suffix))


def sealed(whole, suffix):
    """A file with its checksum: in the comment of an archive, or in the header of safetensors."""
    at = len(whole) - 64 if suffix == ".npz" else whole.index(b'"sha256":"') + 10
    digest = hashlib.sha256(whole[:at] + b"0" * 64 + whole[at + 64 :]).hexdigest()
    return whole[:at] + digest.encode() + whole[at + 64 :]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_and_dtype_comes_back_bit_for_bit(backend, suffix, tmp_path):
    for dtype in {*backend.narrow, backend.widest}:
        like = backend.array(0.0)
        for state in states(backend, dtype).values():
            path = tmp_path / f"state{suffix}"
            state.save(path)
            check_same(backend, type(state).load(path, like=like), state, dtype)
            check_same(backend, type(state).load(str(path), like), state, dtype)
            assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_states_by_name_come_back_in_their_order(backend, suffix, tmp_path):
    path, kept = tmp_path / f"states{suffix}", states(backend)
    anynorm.save(kept, path)
    found = anynorm.load(path, like=backend.array(0.0))
    assert list(found) == list(kept)
    for name, state in kept.items():
        check_same(backend, found[name], state)
    anynorm.save({}, path)
    assert anynorm.load(path) == {}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_like_arrays_are_those_of_numpy(backend, suffix, tmp_path):
    path = tmp_path / f"state{suffix}"
    for dtype in {*backend.narrow, backend.widest}:
        for state in states(backend, dtype).values():
            state.save(path)
            for name, x in arrays_of(type(state).load(path)).items():
                assert isinstance(x, np.ndarray)
                assert x.dtype.name == dtype
                assert x.flags.writeable
                np.testing.assert_array_equal(x.astype(float), backend.numpy(arrays_of(state)[name]))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_loaded_state_goes_on_where_it_stopped(backend, suffix, tmp_path):
    path = tmp_path / f"state{suffix}"
    x = [backend.array(numbers(n, 3), "float32") for n in (4, 5, 6)]
    running = anynorm.RunningStats.init(3, like=x[0], momentum=None)
    for each in x:
        saved = running
        running = running.update(anynorm.moments(each, axis=0))
    saved.save(path)
    resumed = anynorm.RunningStats.load(path, like=x[0]).update(anynorm.moments(x[-1], axis=0))
    check_same(backend, resumed, running, "float32")


@pytest.mark.cells("numpy", "torch", "jax", "dask", "strict")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_counts_come_back_exactly(backend, suffix, tmp_path):
    path, three = tmp_path / f"state{suffix}", backend.array(numbers(3))
    for count in (0, 2**53 + 1, 10**300, 2.5, 1e-300):
        anynorm.Moments(three, three, count).save(path)
        found = anynorm.Moments.load(path).count
        assert (type(found), found) == (type(count), count)
    each = backend.array([0.0, 2.5, 1e6])
    anynorm.Moments(three, three, each).save(path)
    backend.check(anynorm.Moments.load(path, like=three).count, [0.0, 2.5, 1e6], tolerance=0)
    anynorm.Moments(three[:0], three[:0], 0).save(path)
    assert anynorm.Moments.load(path).mean.shape == (0,)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_counts_and_digits_of_a_run_come_back_and_go_on(backend, suffix, tmp_path):
    own, path = replace(backend, tracked=False), tmp_path / f"state{suffix}"
    x = own.array(np.random.default_rng(3).standard_normal((8, 3)) + 1e4, "float32")
    batch = anynorm.moments(x, axis=0, weights=own.array(np.full((8, 1), 2**21 + 1), "int32"))
    for momentum in (0.9, None):
        state = anynorm.RunningStats.init(3, like=x, momentum=momentum).update(batch).update(batch)
        state.save(path)
        for found in (anynorm.RunningStats.load(path, like=x), state.to(x), state.to(np.zeros(1)).to(x)):
            for kept, whole in ((found, state), (found.update(batch), state.update(batch))):
                for name in ("mean", "var", "count", "_rest", "_var_rest", "_count_rest"):
                    one, other = getattr(kept, name), getattr(whole, name)
                    if other is None:
                        assert one is None
                    else:
                        own.check(one, own.numpy(other), dtype=str(other.dtype).rpartition(".")[2], tolerance=0)
        for found in (anynorm.RunningStats.load(path), state.to(np.zeros(1))):
            assert found.count.dtype == np.float64
            np.testing.assert_array_equal(found.count, [2**25 + 16] * 3)


def test_a_wider_dtype_takes_in_all_the_digits(backend, tmp_path):
    """Float32 alone is off by 4e-3 in the mean."""
    own, path, x = replace(backend, tracked=False), tmp_path / "state.npz", np.random.default_rng(4)
    x = (x.standard_normal((1000, 3)) + 1e6).astype(np.float32)
    mean = x.mean(axis=0, dtype=np.float64)
    batch = anynorm.moments(own.array(x, "float32"), axis=0)
    running = anynorm.RunningStats.init(3, like=own.array(0.0, "float32"), momentum=None).update(batch)
    moving = anynorm.RunningStats(batch.mean, batch.var, 1, momentum=0.75).update(batch)
    for state, exact in ((batch, mean), (running, mean), (moving, 0.75 * own.numpy(batch.mean) + 0.25 * mean)):
        state.save(path)
        wide = [state.to(np.zeros(1)), type(state).load(path, like=np.zeros(1)).to(np.zeros(1))]
        wide += [state.to(own.array(0.0))] if backend.float64 else []
        for found in wide:
            other = replace(own, library="numpy") if isinstance(found.mean, np.ndarray) else own
            np.testing.assert_allclose(other.numpy(found.mean), exact, rtol=0, atol=1e-7)
        if backend.float64:
            y = anynorm.batch_norm(own.array(x.astype(float)), moments=state, eps=0)
            var = own.numpy(state.var) + (0 if state._var_rest is None else own.numpy(state._var_rest))
            np.testing.assert_allclose(own.numpy(y), (x - exact) / np.sqrt(var), rtol=1e-7, atol=1e-7)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_from_before_these_digits_were_kept_loads(suffix, tmp_path):
    path = tmp_path / f"state{suffix}"
    state = anynorm.RunningStats(np.ones(3), np.ones(3), np.array([2.0, 3.0, 4.0], np.float32), momentum=0.5)
    state.save(path)

    def older(content, arrays):
        for name in ("rest", "var_rest"):
            arrays.pop(name)
            content["states"][0]["arrays"].pop(f"_{name}")
        content["states"][0]["options"]["_rest"] = None
        arrays["count"] = arrays["count"].astype(np.float32)
        content["states"][0]["arrays"]["count"] = "float32"

    tampered(path, older)
    found = anynorm.RunningStats.load(path)
    np.testing.assert_array_equal(found.count, [2, 3, 4])
    batch = anynorm.moments(np.full((2, 3), 3.0), axis=0)
    np.testing.assert_array_equal(found.update(batch).mean, [2.0] * 3)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_debiased_run_that_is_resumed_is_the_run_that_was_not(backend, suffix, tmp_path):
    own, path = replace(backend, tracked=False), tmp_path / f"state{suffix}"
    x, mask = own.array(numbers(4, 3)), own.array(numbers(4, 3) > 0.5, "bool")
    running = anynorm.RunningStats.init(3, like=x, momentum=0.75, debias=True)
    for weights in (None, mask, None):
        running = running.update(anynorm.moments(x, axis=0, weights=weights))
        running.save(path)
        expected = running.update(anynorm.moments(x, axis=0))
        for found in (anynorm.RunningStats.load(path, like=x), running.to(np.zeros(1)).to(x), copy.deepcopy(running)):
            assert found.debias
            again = found.update(anynorm.moments(x, axis=0))
            own.check(again.mean, own.numpy(expected.mean), tolerance=0)
            own.check(again.var, own.numpy(expected.var), tolerance=0)


@pytest.mark.cells("numpy")
def test_a_state_without_debias_is_filed_as_before_there_was_one(tmp_path):
    path = tmp_path / "state.npz"
    anynorm.RunningStats.init(3, like=np.zeros(1)).save(path)
    kept = []
    tampered(path, lambda content, arrays: kept.extend([content["states"][0]["options"], sorted(arrays)]))
    assert kept == [{"count": 0, "momentum": 0.9, "correction": 0}, ["mean", "rest", "var", "var_rest"]]
    assert not anynorm.RunningStats.load(path).debias


@pytest.mark.cells("numpy")
@pytest.mark.parametrize(
    "options",
    [{"_updates": -1}, {"_updates": 1.5}, {"_updates": True}, {"debias": 1}, {"debias": False}, {"momentum": None}],
    ids=str,
)
def test_a_number_of_updates_that_cannot_be_is_refused(options, tmp_path):
    path = tmp_path / "state.npz"
    anynorm.RunningStats.init(3, like=np.zeros(1), debias=True).save(path)
    tampered(path, lambda content, arrays: content["states"][0]["options"].update(options))
    with pytest.raises(ValueError, match=r"state\.npz must hold what anynorm saves, got: "):
        anynorm.RunningStats.load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_arrays_lie_beside_states(backend, suffix, tmp_path):
    own, path = replace(backend, tracked=False), tmp_path / f"norms{suffix}"
    running = anynorm.RunningStats.init(3, like=own.array(numbers(3)))
    saved = {
        "bn1.gamma": backend.array(numbers(3)),
        "bn1": running,
        "bn1.mean": own.array(numbers(2, 0)),
        "file": own.array(2.5),
    }
    for dtype in own.narrow:
        saved[dtype] = own.array(numbers(3, 2), dtype)
    anynorm.save({**saved, "anynorm": np.arange(4, dtype=np.uint8)}, path)
    found = anynorm.load(path, like=own.array(0.0))
    assert list(found) == [*saved, "anynorm"]
    for name, each in saved.items():
        if name == "bn1":
            check_same(own, found[name], each)
            continue
        dtype = name if name in own.narrow else None
        own.check(found[name], own.numpy(each), dtype=dtype, tolerance=0)
    np.testing.assert_array_equal(own.numpy(found["anynorm"]), np.arange(4))
    assert type(anynorm.load(path)["bn1.gamma"]) is np.ndarray
    with pytest.raises(ValueError, match=rf"must hold one RunningStats, got {len(saved) + 1} states by name"):
        anynorm.RunningStats.load(path)


@pytest.mark.cells("numpy")
def test_an_array_that_is_none_is_refused(tmp_path):
    for i, change in enumerate(
        (
            lambda state: state["options"].update(axis=0),
            lambda state: state["arrays"].update(mean=state["arrays"].pop("array")),
            lambda state: state.update(kind="Array"),
        )
    ):
        path = tmp_path / f"{i}.npz"
        anynorm.save({"gamma": np.ones(3)}, path)

        def changed(content, arrays, change=change):
            change(content["states"][0])
            if "mean" in content["states"][0]["arrays"]:
                arrays["gamma.mean"] = arrays.pop("gamma.array")

        tampered(path, changed)
        with pytest.raises(ValueError, match=r"must hold "):
            anynorm.load(path)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_numbers_that_are_not_finite_come_back_and_so_do_integers_and_foreign_byte_orders(suffix, tmp_path):
    path, odd = tmp_path / f"state{suffix}", np.array([np.nan, np.inf, -0.0, 5e-324])
    state = anynorm.Moments(odd.astype(">f8")[::-1], odd[::-1], np.array([1, 2**53 + 1, 3, 0]))
    state.save(path)
    found = anynorm.Moments.load(path)
    assert found.mean.tobytes() == found.var.tobytes() == odd[::-1].tobytes()
    assert (found.mean.dtype, found.count.dtype, found.count[1]) == (np.float64, np.int64, 2**53 + 1)
    with pytest.raises(TypeError, match=r"^mean must have one of the dtypes bfloat16, .*, got "):
        anynorm.Moments(odd.astype(np.longdouble), odd, 1).save(path)
    assert anynorm.Moments.load(path).count[1] == 2**53 + 1
    anynorm.moments(odd[2:], axis=0).merge(anynorm.moments(odd[2:], axis=0)).save(path)
    assert anynorm.Moments.load(path).mean.shape == ()


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_was_cut_or_lengthened_anywhere_is_refused(suffix, tmp_path):
    from backends import Backend

    path = tmp_path / f"state{suffix}"
    anynorm.save(states(Backend("numpy", np, "cpu")), path)
    whole = path.read_bytes()
    for size in [*range(200), *range(200, len(whole), 7), *range(len(whole) - 100, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"^{path} must be a whole file of anynorm, got one "):
            anynorm.load(path)
    for more in (b"\0", b"0" * 64, whole):
        path.write_bytes(whole + more)
        with pytest.raises(ValueError, match=f"^{path} must be a whole file "):
            anynorm.load(path)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_byte_that_was_changed_anywhere_is_found(suffix, tmp_path):
    from backends import Backend

    path, rng = tmp_path / f"state{suffix}", random.Random(0)
    states(Backend("numpy", np, "cpu"))["exact"].save(path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= rng.choice([1, 2, 4, 8, 16, 32, 64, 128, rng.randrange(1, 256)])
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"^{path} must be a whole file "):
            anynorm.RunningStats.load(path)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_another_kind_or_of_a_newer_version_is_refused(suffix, tmp_path):
    one, many = tmp_path / f"one{suffix}", tmp_path / f"many{suffix}"
    running = anynorm.RunningStats(np.zeros(3), np.ones(3), 1)
    running.save(one)
    anynorm.save({"a": running, "b": running}, many)
    for message, load, path in (
        (f"{one} must hold Moments, got RunningStats", anynorm.Moments.load, one),
        (f"{many} must hold one RunningStats, got 2 states by name: anynorm.load reads them",
         anynorm.RunningStats.load, many),
        (f"{one} must hold states by name, got one RunningStats: RunningStats.load reads it", anynorm.load, one),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}$"):
            load(path)
    tampered(one, lambda content, arrays: content.update(version=2, states="what nobody knows yet"))
    with pytest.raises(ValueError, match=f"^{one} must be of format 1 or older, got 2: a newer anynorm wrote it$"):
        anynorm.RunningStats.load(one)


CHANGES = {
    "an array is missing": lambda content, arrays: arrays.pop("var"),
    "an array is one too many": lambda content, arrays: arrays.update(more=np.ones(3)),
    "a dtype is another": lambda content, arrays: arrays.update(var=np.ones(3, np.float32)),
    "a dtype is no float": lambda content, arrays: (
        arrays.update(var=np.ones(3, int)),
        content["states"][0]["arrays"].update(var="int64"),
    ),
    "a shape is another": lambda content, arrays: arrays.update(var=np.ones(2)),
    "the rest is of another shape": lambda content, arrays: arrays.update(rest=np.ones(2)),
    "an option is missing": lambda content, arrays: content["states"][0]["options"].pop("momentum"),
    "an option is one too many": lambda content, arrays: content["states"][0]["options"].update(x=1),
    "a momentum is out of range": lambda content, arrays: content["states"][0]["options"].update(momentum=2),
    "a count is no number": lambda content, arrays: content["states"][0]["options"].update(count="many"),
    "a count is negative": lambda content, arrays: content["states"][0]["options"].update(count=-1),
    "a kind is unknown": lambda content, arrays: content["states"][0].update(kind="Statistics"),
    "there is no version": lambda content, arrays: content.pop("version"),
    "there are no states": lambda content, arrays: content.pop("states"),
    "there is none": lambda content, arrays: (arrays.clear(), content["states"].clear()),
    "there are two": lambda content, arrays: content["states"].append(content["states"][0]),
}


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_whole_and_yet_wrong_is_refused(suffix, change, tmp_path):
    path = tmp_path / f"state{suffix}"
    anynorm.RunningStats(np.zeros(3), np.ones(3), 1, momentum=None).save(path)
    tampered(path, lambda content, arrays: None)
    anynorm.RunningStats.load(path)
    tampered(path, CHANGES[change])
    for load in (anynorm.RunningStats.load, anynorm.load):
        with pytest.raises(ValueError, match=f"^{path} must "):
            load(path)


@pytest.mark.cells("numpy")
def test_pickles_and_packed_arrays_are_refused(tmp_path):
    path, state = tmp_path / "state.npz", anynorm.Moments(np.zeros(3), np.ones(3), 1)

    state.save(path)
    text, arrays = files._from_npz(path.read_bytes())
    arrays[files._TEXT] = np.frombuffer(text.encode(), np.uint8)
    for save, changed in (
        (np.savez, arrays | {"mean": np.array([print] * 3)}),  # an array of objects is a pickle
        (np.savez_compressed, arrays | {"mean": np.zeros(10**6)}),
    ):
        buffer = io.BytesIO()
        save(buffer, **changed)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.comment = b"0" * 64
        path.write_bytes(sealed(buffer.getvalue(), ".npz"))
        with pytest.raises(ValueError, match=f"^{path} must "):
            anynorm.Moments.load(path)
    for whole in (b"", b"PK", b"\x80\x04K\x01.", b"0" * 64, b"0" * 1000):
        for name in ("state.npz", "state.safetensors"):
            other = tmp_path / name
            other.write_bytes(whole)
            with pytest.raises(ValueError, match=f"^{other} must be a whole file "):
                anynorm.Moments.load(other)


def npy(shape, dtype="<f8", data=b"\0" * 24):
    """An array whose header may say what it likes."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


HEADERS = {
    "terabytes": npy(f"({10**12},)"),
    "gigabytes": npy("(1250000000,)"),
    "more than can be counted": npy(f"({2**32}, {2**32}, 4)"),
    "a length that is no number": npy("(" + "9" * 5000 + ",)"),
    "less than nothing": npy("(-3, -1)"),
    "nothing, of any length": npy(f"(0, {2**62}, {2**62})", data=b""),
    "numbers of no size": npy(f"({2**40},)", "|V0", b""),
    "objects": npy("(3,)", "|O"),
    "too few": npy("(2,)"),
    "too many brackets": npy("(" * 3000 + ")" * 3000),
    "a formula": npy("9**9**9"),
    "a long header": b"\x93NUMPY\x02\x00" + b"\xff" * 4 + b"{}",
    "another file": b"hello",
    "no byte": b"",
    "a pickle": b"\x80\x04K\x01.",
}


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("header", HEADERS)
def test_no_array_takes_more_room_than_its_file(header, tmp_path):
    path = tmp_path / "state.npz"
    anynorm.Moments(np.zeros(3), np.ones(3), 1).save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (members | {"mean.npy": HEADERS[header]}).items():
            archive.writestr(name, data)
        archive.comment = b"0" * 64
    path.write_bytes(sealed(buffer.getvalue(), ".npz"))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"^{path} must hold what anynorm saves, got"):
            anynorm.Moments.load(path)
        assert tracemalloc.get_traced_memory()[1] < 1e7
    finally:
        tracemalloc.stop()


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("text", ["[" * 100_000, '{"version": ' + "9" * 5000 + "}", "NaN", "[]", "3", "", "\\"])
def test_a_text_that_no_parser_takes_is_refused(text, tmp_path):
    path = tmp_path / "state.npz"
    path.write_bytes(sealed(files._npz({"mean": np.zeros(3)}, text), ".npz"))
    for load in (anynorm.Moments.load, anynorm.load):
        with pytest.raises(ValueError, match=f"^{path} must hold what anynorm saves, got: "):
            load(path)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_whole_file_of_any_bytes_is_read_or_refused(suffix, tmp_path):
    path = tmp_path / f"state{suffix}"
    anynorm.Moments(np.zeros(3), np.ones(3), 1).save(path)
    whole, rng = path.read_bytes(), random.Random(1)
    refusals = set()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= rng.randrange(1, 256)
        with suppress(ValueError):  # where the checksum's own name was changed
            changed = sealed(bytes(changed), suffix)
        path.write_bytes(changed)
        try:
            anynorm.Moments.load(path)
        except ValueError as error:
            refusals.add(str(error).startswith(f"{path} must "))
    assert refusals == {True}


def refusal(load, path, most=2e7):
    """What is said of a file that is refused; its reading takes no more memory than this."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"^{path} must [^\\n]{{1,400}}$") as caught:
            load(path)
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
    return str(caught.value).removeprefix(f"{path} must ")


HUGE = 3 * 2**30


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("ends", ["zeros", "its own", "a long header", "an endless header"])
def test_a_huge_file_is_refused_from_its_ends(suffix, ends, tmp_path):
    path = tmp_path / f"huge{suffix}"
    anynorm.Moments(np.zeros(3), np.ones(3), 1).save(path)
    whole = path.read_bytes()
    start = len(whole) if suffix == ".safetensors" else whole.index(b"PK\1\2")
    head = {"zeros": b"", "its own": whole[:start]}.get(
        ends, (HUGE - 8 if ends == "a long header" else 2**63).to_bytes(8, "little")
    )
    end = whole[start:] if ends == "its own" else b""
    if end:  # the directory is where the end says
        size = len(end)
        end = end[:-70] + (HUGE - size).to_bytes(4, "little") + end[-66:]
    path.write_bytes(head)
    os.truncate(path, HUGE - len(end))
    with path.open("ab") as file:
        file.write(end)
    try:
        began = time.process_time()
        said = refusal(anynorm.Moments.load, path)
        assert time.process_time() - began < 2  # to read it takes longer
    finally:
        path.unlink()
    assert said == "be a whole file of anynorm, got one that is cut short, changed or another's"


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_more_arrays_than_states_may_have_is_refused(suffix, tmp_path):
    path, one = tmp_path / f"many{suffix}", np.zeros(1)
    whole = files._FORMATS[suffix].encode({str(i): one for i in range(30_000)}, "{}")
    path.write_bytes(sealed(whole, suffix))
    began = time.process_time()
    refusal(anynorm.load, path)
    assert time.process_time() - began < 2


WRONG_STATES = {
    "a name is a number": {"name": 5},
    "a name is a list": {"name": ["a"]},
    "a name is none": {"name": None},
    "a name has a NUL": {"name": "a\0"},
    "a name has a line end": {"name": "a\n"},
    "a name is empty": {"name": ""},
    "a name is long": {"name": "a" * 10_000},
    "a kind is long": {"kind": "k" * 200_000},
    "a kind has lines": {"kind": "k\n" * 5},
    "a kind is a list": {"kind": ["Moments"] * 100_000},
    "an option is long": {"options": {"count": "9" * 200_000}},
    "an option has a long name": {"options": {"count": 1, "x" * 200_000: 1}},
    "an option is a long list": {"options": {"count": [1] * 200_000}},
    "a dtype is short": {"arrays": {"mean": "d", "var": "float64", "_rest": "float64"}},
    "a dtype is none": {"arrays": {"mean": None, "var": "float64", "_rest": "float64"}},
    "a dtype is long": {"arrays": {"mean": "f" * 200_000, "var": "float64", "_rest": "float64"}},
}


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_what_save_refuses_load_refuses_in_few_words(suffix, wrong, tmp_path):
    path = tmp_path / f"states{suffix}"
    anynorm.save({"a": anynorm.Moments(np.zeros(3), np.ones(3), 1)}, path)

    def change(content, arrays):
        content["states"][0] |= WRONG_STATES[wrong]
        name = content["states"][0]["name"]
        for key in ("mean", "var", "rest"):  # by the name that it then has, where a file can have it
            if "\0" not in str(name):
                arrays[f"{name}.{key}" if name else key] = arrays.pop(f"a.{key}")

    tampered(path, change)
    refusal(anynorm.load, path)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_text_is_refused_that_is_long_or_has_an_entry_twice(suffix, tmp_path):
    path, made = tmp_path / f"states{suffix}", files._FORMATS[suffix]
    anynorm.save({"a": anynorm.Moments(np.zeros(3), np.ones(3), 1)}, path)
    text, arrays = made.decode(path.read_bytes())
    for changed in (text[:-1] + ', "more": "' + "a" * 2**23 + '"}', text[:-1] + ', "version": 1}'):
        path.write_bytes(sealed(made.encode(arrays, changed), suffix))
        refusal(anynorm.load, path, 1e8)


SAFETENSORS_HEADERS = {
    "offsets that overlap": lambda header: header["var"].update(data_offsets=header["mean"]["data_offsets"]),
    "offsets out of range": lambda header: header["var"].update(data_offsets=[24, 2**60]),
    "offsets below zero": lambda header: header["var"].update(data_offsets=[-8, 16]),
    "offsets that are no numbers": lambda header: header["var"].update(data_offsets="ab"),
    "an array that is a number": lambda header: header.update(var=5),
    "a shape that cannot be counted": lambda header: header["var"].update(shape=[2**40, 2**40]),
    "a shape of nothing": lambda header: header["var"].update(shape=[0, 2**62]),
    "another dtype": lambda header: header["var"].update(dtype="F8_E4M3"),
    "no dtype": lambda header: header["var"].update(dtype="x" * 200_000),
    "a text that is a number": lambda header: header["__metadata__"].update(anynorm=5),
    "no text": lambda header: header["__metadata__"].pop("anynorm"),
}


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("wrong", [*SAFETENSORS_HEADERS, "an array twice"])
def test_a_header_of_safetensors_that_is_wrong_is_refused(wrong, tmp_path):
    path = tmp_path / "state.safetensors"
    anynorm.Moments(np.zeros(3), np.ones(3), 1).save(path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    SAFETENSORS_HEADERS.get(wrong, lambda header: None)(header)
    text = json.dumps(header, separators=(",", ":"))
    if wrong == "an array twice":
        text = f'{text[:-1]},"var":{json.dumps(header["var"], separators=(",", ":"))}}}'
    text = text.encode() + b" " * (-len(text) % 8)
    whole = len(text).to_bytes(8, "little") + text + whole[8 + length :]
    path.write_bytes(sealed(whole, ".safetensors"))
    refusal(anynorm.Moments.load, path)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_as_many_states_as_are_allowed_come_back_and_one_more_is_refused(suffix, tmp_path):
    path, three = tmp_path / f"states{suffix}", np.ones(3)
    state = anynorm.RunningStats(three, three, three)  # of five arrays
    names = [f"transformer.encoder.layers.{i:04d}.self_attention.output_norm" for i in range(4096)]
    anynorm.save(dict.fromkeys(names, state), path)
    assert list(anynorm.load(path)) == names
    with pytest.raises(ValueError, match=r"^states must be at most 4096, got 4097$"):
        anynorm.save(dict.fromkeys([*names, "more"], state), path)
    with pytest.raises(ValueError, match=r"^states must have names of at most 8192 letters, got 8193: 'a{19}\.\.\.$"):
        anynorm.save({"a" * 8193: state}, path)
    with pytest.raises(
        ValueError, match=r"^states must have names that take at most 4194304 bytes in a file, got more$"
    ):
        anynorm.save({f"{'é' * 8000}{i}": state for i in range(200)}, path)
    anynorm.save({"é" * 8192: state}, path)
    assert list(anynorm.load(path)) == ["é" * 8192]


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_may_have_any_characters_that_can_be_printed(suffix, tmp_path):
    names = [
        "/",
        "..",
        "../../etc/passwd",
        "a/b.c",
        "a.b",
        "C:\\x",
        "'\"",
        '"sha256":"' + "0" * 64 + '"',
        "é",
        "e\u0301",
        "日本",
    ]
    names += ["a" * 5000, "anynorm", "file", "mean", "a.mean", "__metadata__", "x.npy", "😀", "-", "%s{}"]
    kept = {name: anynorm.Moments(np.full(2, float(i)), np.ones(2), i) for i, name in enumerate(names)}
    path = tmp_path / f"states{suffix}"
    anynorm.save(kept, path)
    found = anynorm.load(path)
    assert list(found) == names
    assert all(found[name].count == i and found[name].mean[0] == i for i, name in enumerate(names))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.cells("numpy")
def test_a_path_says_what_is_wrong_with_it(tmp_path):
    state = anynorm.Moments(np.zeros(3), np.ones(3), 1)
    for use in (state.save, anynorm.Moments.load):
        for name in ("state.pt", "state", "npz", "state.npz.bak"):
            with pytest.raises(ValueError, match=rf"^path must end in \.npz or \.safetensors, got {tmp_path / name}$"):
                use(tmp_path / name)
        with pytest.raises(TypeError, match=r"^path must be a str or a path, got int$"):
            use(3)
        with pytest.raises(TypeError, match=r"^path must be a str or a path, got bytes$"):
            use(b"state.npz")
        for name, shown in (("a\0.npz", r"a\\x00\.npz"), ("\ud800.npz", r"\\ud800\.npz")):
            with pytest.raises(ValueError, match=rf"^path must be a name that a file may have, got '{shown}'$"):
                use(name)
        (tmp_path / "folder.npz").mkdir(exist_ok=True)
        with pytest.raises(OSError, match=r"folder\.npz"):
            use(tmp_path / "folder.npz")
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        anynorm.Moments.load(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        state.save(tmp_path / "nowhere" / "state.npz")
    with pytest.raises(TypeError, match=r"^like must be an array, got str$"):
        anynorm.Moments.load(tmp_path / "none.npz", like="numpy")
    assert os.listdir(tmp_path) == ["folder.npz"]


@pytest.mark.cells("numpy")
def test_what_is_no_dict_of_states_is_refused(tmp_path):
    state = anynorm.Moments(np.zeros(3), np.ones(3), 1)
    for error, message, given in (
        (TypeError, "states must be a dict of states by name, got Moments", state),
        (TypeError, "states must have names that are strings, got 1", {1: state}),
        (ValueError, "states must have names that can be printed, got ''", {"": state}),
        (ValueError, "states must have names that can be printed, got 'a\\\\x00'", {"a\0": state}),
        (TypeError, "states must hold Moments, RunningStats, WeightNorm or arrays, got list as 'a'", {"a": [0.0]}),
        (TypeError, "a must be a plain array, got MaskedArray.*", {"a": np.ma.ones(3)}),
        (TypeError, "a must have one of the dtypes .*, got complex128", {"a": np.zeros(3, complex)}),
    ):
        with pytest.raises(error, match=f"^{message}$"):
            anynorm.save(given, tmp_path / "states.npz")
    assert not os.listdir(tmp_path)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("missing", ["safetensors", "ml_dtypes"])
def test_a_missing_package_is_named(missing, tmp_path, monkeypatch):
    import ml_dtypes

    half = np.ones(3, ml_dtypes.bfloat16)
    path = tmp_path / {"safetensors": "state.safetensors", "ml_dtypes": "state.npz"}[missing]
    anynorm.Moments(half, half, 1).save(path)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=f"need.* {missing}: pip install "):
        anynorm.Moments.load(path)


@pytest.mark.cells("numpy")
@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_a_file_is_as_any_new_file_and_a_link_stays_a_link(tmp_path):
    state, path = anynorm.Moments(np.zeros(3), np.ones(3), 1), tmp_path / "state.npz"
    before = os.umask(0o027)
    try:
        state.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    link = tmp_path / "link.npz"
    link.symlink_to(path)
    anynorm.Moments(np.zeros(3), np.ones(3), 2).save(link)
    assert link.is_symlink()
    assert anynorm.Moments.load(path).count == 2


@pytest.mark.cells("numpy")
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes elsewhere")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_no_regular_file_is_neither_waited_for_nor_replaced(suffix, tmp_path):
    state, pipe, endless, loop = (
        anynorm.Moments(np.zeros(3), np.ones(3), 1),
        *(tmp_path / f"{name}{suffix}" for name in ("pipe", "endless", "loop")),
    )
    os.mkfifo(pipe)
    endless.symlink_to("/dev/zero")
    loop.symlink_to(loop)
    for use in (state.save, anynorm.Moments.load):
        # of the device only reading is tried: a save that went wrong would take its place
        for path in (pipe,) if use == state.save else (pipe, endless):
            with pytest.raises(ValueError, match=f"^{path} must be a regular file, got a pipe, a socket or a device$"):
                use(path)
        with pytest.raises(OSError, match=loop.name):
            use(loop)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert loop.is_symlink()
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(call, tmp_path, monkeypatch):
    path = tmp_path / "state.npz"
    anynorm.Moments(np.zeros(3), np.ones(3), 1).save(path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        patched.setattr("pathlib.Path.replace", full if call == "replace" else files.Path.replace)
        with pytest.raises(OSError, match="No space left"):
            anynorm.Moments(np.zeros(3), np.ones(3), 2).save(path)
    assert os.listdir(tmp_path) == ["state.npz"]
    assert anynorm.Moments.load(path).count == 1


SAVER = """
import sys, numpy as np, anynorm
path, count = sys.argv[1], int(sys.argv[2])
while True:
    count += 1
    numbers = np.full(60_000, float(count))
    anynorm.Moments(numbers, numbers, count).save(path)
    print(count, flush=True)
"""


@pytest.mark.cells("numpy")
@pytest.mark.skipif(os.name != "posix", reason="there is no kill -9 elsewhere")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_kill_9_at_random_moments_of_200_saves_never_loses_the_last_whole_state(suffix, tmp_path):
    path, rng, count = tmp_path / f"state{suffix}", random.Random(0), 0
    while count < 200:
        saver = subprocess.Popen([sys.executable, "-c", SAVER, path, str(count)], stdout=subprocess.PIPE, text=True)
        with saver:
            for _ in range(rng.randrange(1, 80)):
                told = int(saver.stdout.readline())
            threading.Event().wait(rng.uniform(0, 0.01))
            saver.send_signal(signal.SIGKILL)
            told = max([told, *map(int, saver.stdout.read().split())])
        found = anynorm.Moments.load(path)
        assert found.count in (told, told + 1)  # one may have been in place before it could be told
        assert np.all(found.mean == found.count)
        count = found.count
    assert {each.suffix for each in tmp_path.iterdir()} <= {suffix, ".tmp"}


@pytest.mark.cells("numpy")
def test_those_who_save_at_once_leave_the_file_of_one_of_them(tmp_path):
    path, wrong = tmp_path / "state.npz", []

    def save(who):
        numbers = np.full(5000, float(who))
        for _ in range(20):
            anynorm.Moments(numbers, numbers, who).save(path)
            found = anynorm.Moments.load(path)
            if not np.all(found.mean == found.count):
                wrong.append(found.count)

    threads = [threading.Thread(target=save, args=(who,)) for who in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert os.listdir(tmp_path) == ["state.npz"]


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_processes_that_save_at_once_leave_the_file_of_one_of_them(suffix, tmp_path):
    path = tmp_path / f"state{suffix}"
    savers = [
        subprocess.Popen([sys.executable, "-c", SAVER, path, str(count)], stdout=subprocess.PIPE, text=True)
        for count in (0, 10**6)
    ]
    try:
        for saver in savers:
            saver.stdout.readline()
        for _ in range(60):
            found = anynorm.Moments.load(path)
            assert np.all(found.mean == found.count)
    finally:
        for saver in savers:
            saver.kill()
            saver.communicate()


def test_a_state_moves_to_another_library_and_back(backend):
    like = backend.array(0.0)
    for state in states(backend).values():
        there = state.to(np.zeros(1))
        assert all(isinstance(x, np.ndarray) and x.dtype == np.float64 for x in arrays_of(there).values())
        back = there.to(like)
        check_same(backend, back, state)
        assert back is not state
        if isinstance(state, anynorm.RunningStats):
            x = backend.array(numbers(4, 3))
            backend.check(anynorm.batch_norm(x, moments=back), backend.numpy(anynorm.batch_norm(x, moments=state)))


@pytest.mark.cells("numpy", "cupy", "torch", "jax", "dask")
def test_numbers_that_a_dtype_has_no_room_for_become_inf_without_a_warning(backend):
    large = anynorm.Moments(*(backend.array(np.full(2, 1e5), "float32") for _ in range(2)), 3)
    assert np.all(backend.numpy(large.to(backend.array(0.0, "float16")).var) == np.inf)


def test_a_state_moves_to_another_dtype(backend):
    for dtype in backend.narrow:
        like = backend.array(0.0, dtype)
        for state in states(backend).values():
            for start in (state, state.to(np.zeros(1))):
                moved = start.to(like)
                assert conventions_of(moved) == conventions_of(state)
                for name, x in arrays_of(moved).items():
                    assert x.dtype == like.dtype
                    if name != "_rest":
                        tolerance = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-7}[dtype]
                        backend.check(x, backend.numpy(arrays_of(state)[name]), dtype=dtype, tolerance=tolerance)
                if isinstance(state, anynorm.Moments) and backend.float64:  # what the mean lost is in the rest
                    both = backend.numpy(moved.mean) + backend.numpy(moved._rest)
                    np.testing.assert_allclose(both, backend.numpy(state.mean), rtol=1e-4 if "16" in dtype else 1e-13)


@pytest.mark.cells("torch", "jax")
def test_a_state_stays_differentiable_within_its_library(backend):
    v = backend.array(numbers(4, 3), "float32")
    state = anynorm.WeightNorm(v, backend.array(numbers(4), "float32")).to(backend.array(0.0))
    if backend.library == "torch":
        assert state.v.requires_grad == backend.tracked
    else:
        import jax

        moved = jax.jit(lambda state: state.to(jax.numpy.zeros(1, "float32")))(state)
        backend.check(moved.v, backend.numpy(v), dtype="float32", tolerance=0)


def test_only_a_floating_array_says_where_to(backend):
    state = anynorm.Moments(backend.array(numbers(3)), backend.array(numbers(3)), 1)
    for like in ("numpy", None, np.zeros(1, int)):
        with pytest.raises(TypeError, match=r"^like must "):
            state.to(like)


@pytest.mark.cells("jax")
def test_without_float64_a_wide_state_is_narrowed_and_no_count_overflows(backend, tmp_path):
    import jax

    path, third = tmp_path / "state.npz", np.full(2, 1 / 3)
    state = anynorm.Moments(third, third, np.array([3, 2**40]))
    state.save(path)
    with jax.enable_x64(False):
        like = jax.numpy.zeros(1)
        for found in (anynorm.Moments.load(path, like=like), state.to(like)):
            assert found.mean.dtype == np.float32
            np.testing.assert_allclose(found.count, [3, 2**40])
        np.testing.assert_allclose(both_parts(state.to(like)), third, rtol=1e-14)


def both_parts(moments):
    return np.asarray(moments.mean, np.float64) + np.asarray(moments._rest, np.float64)
