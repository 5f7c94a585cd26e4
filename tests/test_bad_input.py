"""Bad input is refused before any work is done, in one sentence: argument, rule, received."""

import re

import numpy as np
import pytest

import anynorm

NORMS = [
    (anynorm.normalize, {"axis": -1}),
    (anynorm.layer_norm, {}),
    (anynorm.batch_norm, {}),
    (anynorm.instance_norm, {}),
    (anynorm.group_norm, {"groups": 1}),
    (anynorm.rms_norm, {}),
]
norms = pytest.mark.parametrize(("norm", "options"), NORMS, ids=[norm.__name__ for norm, _ in NORMS])


def refused(error, message, function, *args, **options):
    """The call raises this error, with this message and nothing else."""
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        function(*args, **options)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@norms
@pytest.mark.parametrize(
    ("x", "kind"), [([1.0, 2.0], "list"), (1.5, "float"), (None, "NoneType"), ("x", "str"), ((1.0,), "tuple")]
)
def test_what_is_not_an_array_is_refused(norm, options, x, kind):
    refused(TypeError, f"x must be an array, got {kind}", norm, x, **options)


@norms
def test_a_table_is_refused_with_the_way_to_its_array(norm, options):
    class DataFrame:
        def to_numpy(self):
            return np.ones((2, 3, 4))

    refused(TypeError, "x must be an array, got DataFrame: write x.to_numpy()", norm, DataFrame(), **options)


@pytest.mark.cells("numpy")
@pytest.mark.filterwarnings("ignore:the matrix subclass")
@norms
def test_masked_arrays_and_matrices_are_refused(norm, options):
    message = "x must be a plain array, got MaskedArray: write x.data, weights=~x.mask if that is what you mean"
    refused(TypeError, message, norm, np.ma.ones((2, 3, 4)), **options)
    message = "x must be a plain array, got matrix: write np.asarray(x) if that is what you mean"
    refused(TypeError, message, norm, np.asmatrix(np.ones((2, 3))), **options)


@pytest.mark.cells("numpy")
def test_what_is_said_of_a_masked_array_does_what_the_mask_means():
    x = np.ma.masked_greater(np.arange(12.0).reshape(3, 4), 9.5)
    found = anynorm.moments(x.data, axis=0, weights=~x.mask)
    np.testing.assert_allclose(found.mean, x.mean(axis=0))
    np.testing.assert_allclose(found.var, x.var(axis=0))
    message = "gamma must be a plain array, got MaskedArray: write gamma.data if that is what you mean"
    refused(TypeError, message, anynorm.layer_norm, x.data, np.ma.ones(4))


class Metres(np.ndarray):
    """An array that says more than its numbers."""


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("rows", [2, 2**18])
def test_a_subclass_is_refused_whatever_the_size_but_for_a_mapped_file(tmp_path, rows):
    x = np.ones((rows, 3), np.float32)
    message = "{} must be a plain array, got Metres: write np.asarray({}) if that is what you mean"
    for function in (anynorm.layer_norm, anynorm.rms_norm, anynorm.batch_norm):
        refused(TypeError, message.format("x", "x"), function, x.view(Metres))
    refused(TypeError, message.format("gamma", "gamma"), anynorm.layer_norm, x, x[0].view(Metres))
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
    assert type(anynorm.layer_norm(mapped)) is np.ndarray


@pytest.mark.cells("numpy", "torch", "jax", "strict")
@norms
@pytest.mark.parametrize("dtype", ["int32", "int64", "bool", "complex64"])
def test_a_dtype_that_is_not_real_and_floating_is_refused_with_the_cast_to_write(backend, norm, options, dtype):
    if backend.library == "torch":
        dtype = getattr(backend.xp, dtype)
        x = backend.xp.ones((2, 3, 4), dtype=dtype, device=backend.device)
    else:
        dtype = np.dtype(dtype) if backend.library == "numpy" else getattr(backend.xp, dtype)
        x = backend.xp.ones((2, 3, 4), dtype=dtype)
    with pytest.raises(TypeError, match=r"^x must have a real floating dtype, got .*: write .*float32.*$") as caught:
        norm(x, **options)
    part = "x.real" if "complex" in str(dtype) else "x"
    cast = {
        "torch": f"{part}.to(torch.float32)",
        "strict": f"xp.astype({part}, xp.float32)",
    }.get(backend.library, f"{part}.astype('float32')")
    assert f"write {cast} " in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.cells("numpy")
@norms
def test_object_and_structured_arrays_are_refused(norm, options):
    for x in (np.ones((2, 3), dtype=object), np.zeros((2, 3), dtype=[("a", "f4")]), np.full((2, 3), "a")):
        with pytest.raises(TypeError, match="^x must have a real floating dtype, got "):
            norm(x, **options)


@pytest.mark.cells("torch", "jax", "dask", "strict")
def test_arrays_of_two_libraries_are_refused_by_name(backend):
    x, gamma = backend.array(np.ones((2, 3))), np.ones(3)
    name = "array_api_strict" if backend.library == "strict" else backend.library
    expected = f"x and beta must come from one array library, got numpy and {name}"
    refused(TypeError, expected, anynorm.layer_norm, np.ones((2, 3)), None, backend.array(gamma))
    expected = f"mean and var must come from one array library, got {name} and numpy"
    refused(TypeError, expected, anynorm.Moments, x, np.ones((2, 3)), 1)
    if name == "jax":  # which takes NumPy's arrays beside an x of its own
        return
    expected = f"x and gamma must come from one array library, got {name} and numpy"
    for norm in (anynorm.layer_norm, anynorm.rms_norm):
        refused(TypeError, expected, norm, x, gamma)
    expected = f"v and g must come from one array library, got {name} and numpy"
    refused(TypeError, expected, anynorm.weight_norm, x, np.ones(2))
    given = anynorm.moments(np.ones((2, 3)), axis=0)
    expected = f"x and moments.mean must come from one array library, got {name} and numpy"
    refused(TypeError, expected, anynorm.batch_norm, x, moments=given)
    _, pullback = anynorm.vjp(anynorm.layer_norm, x)
    refused(TypeError, f"y and dy must come from one array library, got {name} and numpy", pullback, np.ones((2, 3)))


def test_a_parameter_of_the_wrong_shape_is_refused(backend):
    x = backend.array(np.ones((8, 64, 7, 7)))
    wrong = backend.array(np.ones(32))
    message = "{} must have shape (64,) or, with as many axes, broadcast to (8, 64, 7, 7), got (32,)"
    refused(ValueError, message.format("gamma"), anynorm.batch_norm, x, wrong)
    refused(ValueError, message.format("beta"), anynorm.instance_norm, x, None, wrong)
    refused(ValueError, message.format("gamma"), anynorm.group_norm, x, wrong, groups=8)
    for shape in ((), (7,), (64, 1, 1), (1, 8, 64, 7, 7), (2, 64, 1, 1)):
        with pytest.raises(
            ValueError, match=r"^gamma must have shape \(64,\) or, with as many axes, broadcast to \(8, 64, 7, 7\), got"
        ):
            anynorm.batch_norm(x, backend.array(np.ones(shape)))
    message = "gamma must have shape (7, 7) or, with as many axes, broadcast to (8, 64, 7, 7), got (7,)"
    refused(ValueError, message, anynorm.layer_norm, x, backend.array(np.ones(7)), axis=(2, 3))
    message = "g must have shape (8,) or, with as many axes, broadcast to (8, 64, 7, 7), got (64,)"
    refused(ValueError, message, anynorm.weight_norm, x, backend.array(np.ones(64)))


def test_a_parameter_that_is_no_floating_array_is_refused(backend):
    x = backend.array(np.ones((2, 3)))
    refused(TypeError, "gamma must be an array, got float", anynorm.layer_norm, x, 1.0)
    refused(TypeError, "beta must be an array, got list", anynorm.layer_norm, x, None, [0.0] * 3)
    refused(TypeError, "g must be an array, got float", anynorm.weight_norm, x, 1.0)
    refused(TypeError, "g must be an array, got NoneType", anynorm.weight_norm, x, None)
    with pytest.raises(TypeError, match="^gamma must have a real floating dtype, got "):
        anynorm.layer_norm(x, x > 0)


@pytest.mark.parametrize("norm", [anynorm.layer_norm, anynorm.rms_norm, anynorm.normalize, anynorm.moments])
def test_an_axis_that_is_not_there_is_refused(backend, norm):
    x = backend.array(np.ones((2, 3)))
    for axis in (2, -3, (0, 2)):
        refused(ValueError, f"axis must be in [-2, 2) for shape (2, 3), got {axis}", norm, x, axis=axis)
    refused(ValueError, "axis must name at least one axis, got ()", norm, x, axis=())
    for axis in ((0, 0), (1, -1)):
        refused(ValueError, f"axis must name each axis once, got {axis} for shape (2, 3)", norm, x, axis=axis)
    for axis in (1.0, "1", True, [0]):
        refused(TypeError, f"axis must be an int or a tuple of ints, got {axis!r}", norm, x, axis=axis)
    assert norm(x, axis=np.int64(1)) is not None


def test_a_channel_axis_that_is_not_there_is_refused(backend):
    x = backend.array(np.ones((2, 3, 4)))
    for norm, options in ((anynorm.batch_norm, {}), (anynorm.instance_norm, {}), (anynorm.group_norm, {"groups": 1})):
        message = "channel_axis must be in [-3, 3) for shape (2, 3, 4), got 3"
        refused(ValueError, message, norm, x, channel_axis=3, **options)
        for axis in (1.0, None, (1,)):
            refused(TypeError, f"channel_axis must be an int, got {axis!r}", norm, x, channel_axis=axis, **options)
    for norm, options in ((anynorm.instance_norm, {}), (anynorm.group_norm, {"groups": 1})):
        message = "x must have at least two axes, the channels on axis 1, got shape (3,)"
        refused(ValueError, message, norm, backend.array(np.ones(3)), **options)
    refused(
        ValueError,
        "x must have more than the 2 axes that keep statistics of their own, got 2",
        anynorm.instance_norm,
        backend.array(np.ones((2, 3))),
    )
    message = "x must have at least two axes, got shape (3,): write x[None, ...] and channel_axis=1 for one sample"
    for axis in (0, 1):
        refused(ValueError, message, anynorm.batch_norm, backend.array(np.ones(3)), channel_axis=axis)


@norms
def test_a_number_is_not_enough_of_an_array(backend, norm, options):
    refused(ValueError, "x must have at least one axis, got a 0-d array", norm, backend.array(1.0), **options)


def test_groups_must_divide_the_channels(backend):
    x = backend.array(np.ones((2, 6, 4)))
    for groups in (4, 0, -1, 12):
        refused(
            ValueError, f"groups must divide the 6 channels of x, got {groups}", anynorm.group_norm, x, groups=groups
        )
    for groups in (2.0, None, "2", True):
        refused(TypeError, f"groups must be an int, got {groups!r}", anynorm.group_norm, x, groups=groups)


@norms
def test_eps_must_be_a_finite_number_that_is_not_negative(backend, norm, options):
    x = backend.array(np.ones((2, 3, 4)))
    for eps in (-1e-5, float("nan"), float("inf")):
        refused(ValueError, f"eps must be finite and at least 0, got {eps}", norm, x, eps=eps, **options)
    refused(ValueError, "eps must be finite and at least 0, got inf", norm, x, eps=10**5000, **options)
    for eps, kind in ((None, "NoneType"), ("1e-5", "str"), (True, "bool"), (1j, "complex")):
        refused(TypeError, f"eps must be a real number, got {kind}", norm, x, eps=eps, **options)
    backend.check(norm(x, eps=np.float32(1e-5), **options), backend.numpy(norm(x, eps=1, **options)), tolerance=1.0)


def test_moments_must_be_moments_that_fit(backend):
    x = backend.array(np.ones((2, 3, 4)))
    pair = (backend.array(np.ones(3)), backend.array(np.ones(3)))
    refused(TypeError, "moments must be Moments or RunningStats, got tuple", anynorm.batch_norm, x, moments=pair)
    given = anynorm.moments(x, axis=0)
    message = "moments.mean must have shape (3,), got (3, 4)"
    refused(ValueError, message, anynorm.batch_norm, x, moments=given)


def test_return_moments_is_true_or_false_before_anything_is_written():
    x, out = np.arange(6.0).reshape(2, 3), np.zeros((2, 3))
    message = "return_moments must be True or False, got ndarray"
    refused(TypeError, message, anynorm.batch_norm, x, return_moments=np.ones(2), out=out)
    refused(TypeError, message, anynorm.vjp, anynorm.batch_norm, x, return_moments=np.ones(2), out=out)
    assert not out.any()


class Number:
    """What may be another number later and yet has a hash, as a tensor without axes."""

    def __index__(self):
        return self.value


def test_an_axis_is_the_number_that_it_is_now(backend):
    x, axis = backend.array(np.arange(24.0).reshape(2, 3, 4)), Number()
    for axis.value in (1, 2):
        for given in (axis, (axis,)):
            backend.check(anynorm.layer_norm(x, axis=given), backend.numpy(anynorm.layer_norm(x, axis=axis.value)))


def test_only_the_librarys_own_norms_have_a_pullback(backend):
    x = backend.array(np.ones((2, 3)))
    names = "normalize, layer_norm, batch_norm, instance_norm, group_norm, rms_norm, weight_norm, center, denormalize"
    refused(TypeError, f"norm must be one of anynorm's {names}, got 'moments'", anynorm.vjp, anynorm.moments, x, axis=0)
    refused(TypeError, f"norm must be one of anynorm's {names}, got 'layer_norm'", anynorm.vjp, "layer_norm", x)
    kind = type(x).__name__
    refused(TypeError, f"norm must be one of anynorm's {names}, got {kind!r}", anynorm.vjp, x, x)
    with pytest.raises(TypeError, match="momentum"):
        anynorm.vjp(anynorm.batch_norm, x, momentum=0.1)


def test_a_cotangent_must_fit(backend):
    _, pullback = anynorm.vjp(anynorm.layer_norm, backend.array(np.ones((2, 3))))
    message = "dy must have the shape of y, (2, 3), got (3,)"
    refused(ValueError, message, pullback, backend.array(np.ones(3)))
    refused(TypeError, "dy must be an array, got float", pullback, 1.0)


@pytest.mark.cells("strict", "torch", "jax")
def test_arrays_of_two_devices_are_refused(backend):
    x = backend.array(np.ones((2, 3)), "float32")
    if backend.library == "torch":
        other = backend.xp.ones(3, device="meta")
    elif backend.library == "jax":
        import jax

        other = jax.device_put(np.ones(3, dtype=np.float32), jax.devices()[0])
    else:
        elsewhere = next(d for d in backend.xp.__array_namespace_info__().devices() if d != backend.device)
        other = backend.xp.ones(3, dtype=backend.xp.float32, device=elsewhere)
    with pytest.raises(ValueError, match=r"^gamma must be on the device of x, .*, got "):
        anynorm.layer_norm(x, other)
    with pytest.raises(ValueError, match=r"^var must be on the device of mean, .*, got "):
        anynorm.Moments(backend.array(np.ones(3), "float32"), other, 1)
    _, pullback = anynorm.vjp(anynorm.layer_norm, backend.array(np.ones(3), "float32"))
    with pytest.raises(ValueError, match=r"^dy must be on the device of y, .*, got "):
        pullback(other)


def test_states_of_the_wrong_kind_are_refused(backend):
    three, four = backend.array(np.ones(3)), backend.array(np.ones(4))
    refused(ValueError, "var must have the shape of mean, (3,), got (4,)", anynorm.Moments, three, four, 1)
    refused(ValueError, "count must be finite and at least 0, got -1", anynorm.Moments, three, three, -1)
    refused(TypeError, "count must be a real number, got str", anynorm.Moments, three, three, "1")
    refused(TypeError, "mean must be an array, got list", anynorm.RunningStats, [1.0], three)
    for momentum in (1.5, -0.1, float("nan")):
        message = f"momentum must be in [0, 1], got {momentum}"
        refused(ValueError, message, anynorm.RunningStats, three, three, momentum=momentum)
    refused(TypeError, "momentum must be a real number, got str", anynorm.RunningStats, three, three, momentum="a")
    message = "correction must be finite and at least 0, got -1"
    refused(ValueError, message, anynorm.RunningStats, three, three, correction=-1)
    refused(TypeError, "shape must be an int or a tuple of ints, got 1.5", anynorm.RunningStats.init, 1.5, like=three)
    refused(ValueError, "shape must be at least 0, got -1", anynorm.RunningStats.init, -1, like=three)
    refused(ValueError, "shape must be at least 0, got (2, -1)", anynorm.RunningStats.init, (2, -1), like=three)
    refused(TypeError, "debias must be True or False, got int", anynorm.RunningStats, three, three, debias=1)
    refused(TypeError, "correction must be a real number, got str", anynorm.Moments(three, three, 1).std, "1")
    refused(ValueError, "factor must be finite and at least 0, got -1", anynorm.Moments(three, three, 1).scaled, -1)
    refused(TypeError, "like must be an array, got int", anynorm.RunningStats.init, 3, like=0)
    running = anynorm.RunningStats.init(3, like=three)
    refused(TypeError, "moments must be Moments, got tuple", running.update, (three, three))
    refused(TypeError, "moments must be Moments, got RunningStats", running.update, running)
    refused(TypeError, "other must be RunningStats, got Moments", running.merge, anynorm.Moments(three, three, 1))
    refused(
        ValueError,
        "moments must have the shape of the statistics they join, (3,), got (4,)",
        running.update,
        anynorm.Moments(four, four, 1),
    )
    refused(ValueError, "momentum must be None in both to merge, got 0.9 and 0.9", running.merge, running)
    exact = [anynorm.RunningStats.init(3, like=three, momentum=None, correction=c) for c in (0, 1)]
    refused(ValueError, "correction must be the same in both, got 0 and 1", exact[0].merge, exact[1])
    refused(TypeError, "others must be Moments, got NoneType", anynorm.Moments(three, three, 1).merge, None)
    message = "g must have shape (3,) or, with as many axes, broadcast to (3,), got (4,)"
    refused(ValueError, message, anynorm.WeightNorm, three, four)


@pytest.mark.parametrize("kind", [anynorm.Moments, anynorm.RunningStats])
def test_a_variance_is_not_negative_where_its_numbers_are_there(backend, kind):
    mean = backend.array(np.zeros(3))
    for var in ([1.0, -1e-30, 1.0], [np.nan, -1.0, 1.0], [-np.inf, 0.0, 1.0]):
        if backend.library not in ("dask", "cupy"):  # lazy, or on a GPU
            message = "var must be at least 0 everywhere, got an array with less"
            refused(ValueError, message, kind, mean, backend.array(np.array(var)), 3)
    for var in ([np.nan, 1.0, np.inf], [-0.0, 0.0, 1.0]):
        assert kind(mean, backend.array(np.array(var)), 3).count == 3
    assert kind(mean[:0], mean[:0], 0).count == 0


@pytest.mark.cells("numpy", "torch", "strict")
def test_a_count_that_is_no_number_is_not_called_less(backend):
    three = backend.array(np.ones(3))
    for count, what in (([np.nan, 1.0, 2.0], "NaN"), ([np.nan, -1.0, 2.0], "less"), ([0.0, -1.0, 2.0], "less")):
        message = f"count must be at least 0 everywhere, got an array with {what}"
        refused(ValueError, message, anynorm.Moments, three, three, backend.array(np.array(count)))


# what the frameworks call it, beside what it is called here
OTHER_NAMES = [
    (anynorm.layer_norm, {}, {"normalized_shape": "axis", "weight": "gamma", "bias": "beta", "epsilon": "eps"}),
    (anynorm.layer_norm, {}, {"dim": "axis", "mask": "weights", "scale": "gamma", "offset": "beta", "input": "x"}),
    (anynorm.batch_norm, {}, {"axis": "channel_axis", "data_format": "channel_axis", "process_group": "all_reduce"}),
    (anynorm.batch_norm, {}, {"running_mean": "moments", "running_var": "moments", "training": "moments"}),
    (anynorm.batch_norm, {}, {"momentum": "RunningStats", "num_features": "the shape of x", "affine": "gamma"}),
    (anynorm.instance_norm, {}, {"use_input_stats": "moments for inference", "keepdims": "shape of x"}),
    (anynorm.group_norm, {}, {"num_groups": "groups", "num_channels": "the shape of x", "group": "groups"}),
    (anynorm.group_norm, {"groups": 1}, {"data_format": "channel_axis", "eps_": "it takes x, gamma, beta, groups"}),
    (anynorm.rms_norm, {}, {"epsilon": "eps", "weight": "gamma", "normalized_shape": "axis", "moments": "it takes x"}),
    (
        anynorm.normalize,
        {},
        {"dim": "axis", "channel_axis": "all but those of channels", "mean": "moments", "variance": "moments"},
    ),
    (anynorm.moments, {}, {"dim": "axis", "keepdims": "kept", "where": "weights", "correction": "it takes x, axis"}),
    (anynorm.center, {}, {"bias": "beta", "dim": "axis", "mask": "weights", "process_group": "all_reduce"}),
    (anynorm.denormalize, {}, {"weight": "gamma", "dim": "axis", "epsilon": "eps", "running_mean": "moments"}),
    (anynorm.weight_norm, {}, {"weight_g": "g", "dim": "axis", "weight_v": "v"}),
    (
        anynorm.RunningStats,
        {},
        {"running_mean": "mean", "variance": "var", "num_features": "init", "decay": "momentum"},
    ),
    (anynorm.RunningStats.init, {}, {"num_features": "shape", "device": "like", "unbiased": "correction"}),
    (
        anynorm.Moments,
        {},
        {"variance": "var", "n": "count", "momentum": "RunningStats", "eps": "it takes mean, var, count"},
    ),
    (anynorm.Moments.over, {}, {"dim": "axis", "data": "batches"}),
    (anynorm.WeightNorm, {}, {"weight_g": "g", "weight_v": "v", "dim": "axis"}),
    (anynorm.WeightNorm.from_weight, {}, {"weight": "w", "dim": "axis"}),
    (anynorm.options, {}, {"num_threads": "threads", "block_size": "block_bytes"}),
    (anynorm.save, {}, {"state_dict": "states", "f": "path"}),
    (anynorm.load, {}, {"f": "path", "map_location": "like"}),
    (anynorm.Moments.load, {}, {"file": "path", "device": "like"}),
]


@pytest.mark.cells("numpy")
@pytest.mark.parametrize(("function", "options", "names"), OTHER_NAMES, ids=lambda each: getattr(each, "__name__", ""))
def test_another_frameworks_name_of_an_argument_gets_the_name_that_it_has_here(function, options, names):
    one = np.ones((2, 3))
    arrays = (
        ()
        if isinstance(function, type) or function is anynorm.options
        else (one, one)[: 2 if function is anynorm.weight_norm else 1]
    )
    for name, meant in names.items():
        for given in (arrays, ()):  # also where all that is missing has another name
            with pytest.raises(TypeError, match=f"^{function.__name__} has no argument {name}: [^:]*{meant}"):
                function(*given, **options, **{name: one})
    first, second = list(names)[:2]
    both = f"^{function.__name__} has no argument {first}: .*; no argument {second}: "
    with pytest.raises(TypeError, match=both):
        function(*arrays, **options, **{first: one, second: one})
    with pytest.raises(TypeError, match=f"^{function.__name__} has no argument a{{40}}: it takes .{{0,200}}$"):
        function(*arrays, **options, **{"a" * 10**6: one})


@pytest.mark.cells("numpy")
def test_vjp_names_the_argument_of_its_norm():
    x = np.ones((2, 4, 3))
    refused(
        TypeError, "group_norm has no argument group: it is groups here", anynorm.vjp, anynorm.group_norm, x, group=2
    )
    refused(
        TypeError, "layer_norm has no argument epsilon: it is eps here", anynorm.vjp, anynorm.layer_norm, x, epsilon=1
    )
    message = "layer_norm has no argument x by name: it is passed by position"
    refused(TypeError, message, anynorm.vjp, anynorm.layer_norm, x, x=x)
    refused(TypeError, message, anynorm.layer_norm, x=x)


@pytest.mark.cells("numpy")
def test_an_argument_that_is_missing_is_named():
    x = np.ones((2, 4, 3))
    for name, function, arguments in (
        ("x", anynorm.layer_norm, ()),
        ("groups", anynorm.group_norm, (x,)),
        ("axis", anynorm.normalize, (x,)),
        ("axis", anynorm.moments, (x,)),
        ("g", anynorm.weight_norm, (x,)),
        ("like", anynorm.RunningStats.init, (3,)),
    ):
        with pytest.raises(TypeError, match=f"missing 1 required .* argument: '{name}'$"):
            function(*arguments)


@pytest.mark.cells("numpy")
def test_what_has_a_place_is_named_where_more_is_given_by_position():
    x = np.ones((2, 4))
    for function, arguments, places, given in (
        (anynorm.layer_norm, (x, (4,), x, x), "x, gamma, beta", 4),  # as PyTorch orders them
        (anynorm.moments, (x, 0), "x", 2),
        (anynorm.RunningStats, (x, x, 3, 0.9), "mean, var, count", 4),
        (anynorm.RunningStats.init, (4, x), "shape", 2),
    ):
        message = (
            f"{function.__name__} takes {places} by position and its other arguments by name, got {given} by position"
        )
        refused(TypeError, message, function, *arguments)
    refused(TypeError, "options takes its arguments by name, got 1 by position", anynorm.options, "numba")


@pytest.mark.cells("torch", "jax")
def test_compilers_see_no_more_of_a_function_than_its_arguments(backend):
    x = backend.array(np.arange(6.0).reshape(2, 3))
    if backend.library == "torch":
        compiled = backend.xp.compile(anynorm.layer_norm, fullgraph=True, backend="eager")
        backend.check(compiled(x, axis=0), backend.numpy(anynorm.layer_norm(x, axis=0)))
        compiled = backend.xp.compile(anynorm.layer_norm, backend="eager")
    else:
        import jax

        compiled = jax.jit(anynorm.layer_norm, static_argnames="axis")
    backend.check(compiled(x, axis=0), backend.numpy(anynorm.layer_norm(x, axis=0)))
    with pytest.raises(TypeError, match="^layer_norm has no argument dim: it is axis here"):
        compiled(x, dim=0)
    if backend.library == "torch":
        backend.xp._dynamo.reset()


def test_one_value_has_no_unbiased_variance(backend):
    x = backend.array(np.ones((1, 3)))
    batch = anynorm.moments(x, axis=0)
    message = "statistics of one value have no variance with correction=1, got count 1: "
    message += "leave this batch out, or keep statistics with correction=0"
    for momentum in (0.9, None):
        running = anynorm.RunningStats.init(3, like=x, correction=1, momentum=momentum)
        refused(ValueError, message, running.update, batch)
