"""Sizes that are not numbers: what is exported or traced at one size, or without any, is right at all others."""

import warnings

import numpy as np
import pytest
from oracles import exact

import anynorm

TRACED, OTHERS = (4, 8, 5), [(2, 8, 3), (7, 8, 9), (5, 8, 2)]
CHANNELS = 8
NORMS = [
    (anynorm.layer_norm, {"axis": 1}, "short"),
    (anynorm.layer_norm, {}, "none"),
    (anynorm.rms_norm, {"axis": 1}, "short"),
    (anynorm.normalize, {"axis": (0, 2)}, "each sample"),
    (anynorm.batch_norm, {}, "short"),
    (anynorm.instance_norm, {}, "short"),
    (anynorm.group_norm, {"groups": 2}, "short"),
    (anynorm.group_norm, {"groups": 4}, "each sample"),
    (anynorm.weight_norm, {"axis": 1}, "short"),
]
"""On x of shape (N, 8, L), of which N and L are no numbers; with gamma and beta for each channel, none or others."""
WEIGHTED = (anynorm.batch_norm, anynorm.group_norm)


def parameters_of(norm, kind, scale, gamma, beta):
    found = {"short": (gamma, beta), "none": (), "each sample": (scale, gamma[None, :, None])}[kind]
    return found[: 1 if norm is anynorm.weight_norm else 2]


def all_norms(x, dy, weights, scale, gamma, beta, mean, var, *, norms=NORMS, weighted=WEIGHTED):
    """Everything that the norms give: in training and inference, with and without weights; gradients and moments."""
    found = []
    for norm, options, kind in norms:
        params = parameters_of(norm, kind, scale, gamma, beta)
        y, pullback = anynorm.vjp(norm, x, *params, **options)
        found += [y, *pullback(dy)]
        if norm in weighted:
            found.append(norm(x, *params, weights=weights, **options))
    given = anynorm.Moments(mean, var, 3)
    _, moments = anynorm.batch_norm(x, return_moments=True)
    return [*found, anynorm.batch_norm(x, gamma, beta, moments=given), moments.mean, moments.var]


def expected(x, dy, weights, scale, gamma, beta, mean, var, *, norms=NORMS, weighted=WEIGHTED):
    found = []
    for norm, options, kind in norms:
        params = parameters_of(norm, kind, scale, gamma, beta)
        found += exact(norm, x, dy, *params, **options)[: 2 + len(params)]
        if norm in weighted:
            found.append(exact(norm, x, dy, *params, weights=weights, **options).y)
    whole = exact(anynorm.batch_norm, x, dy)
    return [*found, exact(anynorm.batch_norm, x, dy, gamma, beta, moments=(mean, var)).y, whole.mean, whole.var]


def arguments(shape):
    """x and dy, a weight for each sample, a number for each sample and channel, and four for each channel."""
    rng = np.random.default_rng(sum(shape))
    x, dy = rng.standard_normal((2, *shape)) + 1
    each = (shape[0], 1, 1)  # a weight stands for as many numbers as a sample has, which may be no number
    weights = rng.random(each) * (rng.random(each) > 0.2) + (np.arange(shape[0]) == 0)[:, None, None]
    scale, *channels = rng.standard_normal((*shape[:2], 1)), *rng.standard_normal((3, CHANNELS)), rng.random(CHANNELS)
    return x, dy, weights, scale, *channels


def check(run, shapes=OTHERS, bound=1e-9, **options):
    """`run` takes NumPy arrays and gives what `all_norms` does."""
    for shape in shapes:
        given = arguments(shape)
        found, wanted = run(*given), expected(*given, **options)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(one), np.asarray(other, np.float64), rtol=bound, atol=bound)


@pytest.mark.cells("others-cpu")
@pytest.mark.parametrize("axes", [(0,), (0, 2)], ids=str)
def test_an_array_may_have_sizes_that_are_none(axes):
    import plain

    def run(*given):
        arrays = [plain.asarray(each) for each in given]
        for i in range(4):
            arrays[i] = plain.hidden(arrays[i], *(axes if i < 2 else axes[:1]))
        return [each.to_numpy() for each in all_norms(*arrays)]

    if axes == (0, 2):  # its reshape has one -1 at most
        with pytest.raises(ValueError, match="can only specify one unknown dimension"):
            check(run)
    else:
        check(run)


@pytest.mark.cells("others-cpu")
def test_channels_of_no_known_number_are_not_divided():
    import plain

    x = plain.hidden(plain.asarray(np.ones((2, 6))), 1)
    with pytest.raises(ValueError, match=r"^x must have known sizes to be divided into groups, got shape \(2, None\)$"):
        anynorm.group_norm(x, groups=2)
    np.testing.assert_array_equal(anynorm.batch_norm(x).to_numpy(), np.zeros((2, 6)))


@pytest.mark.cells("ndonnx")
@pytest.mark.parametrize("names", [("N", CHANNELS, 5), ("N", CHANNELS, "L")], ids=str)
def test_a_model_of_ndonnx_takes_all_sizes(names):
    import ndonnx
    import onnxruntime

    shapes = [names] * 2 + [(names[0], 1, 1), (*names[:2], 1)] + [(CHANNELS,)] * 4
    inputs = [ndonnx.argument(shape=shape, dtype=ndonnx.float64) for shape in shapes]
    weighted = WEIGHTED[:1] if names[2] == 5 else ()  # of which ndonnx makes some hundred nodes
    results = all_norms(*inputs, weighted=weighted)
    model = ndonnx.build(
        {f"i{i}": each for i, each in enumerate(inputs)}, {f"o{i}": each for i, each in enumerate(results)}
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(*given):
        wanted = {each.name for each in session.get_inputs()}
        return session.run(None, {f"i{i}": each for i, each in enumerate(given) if f"i{i}" in wanted})

    check(run, [(2, 8, 5), (9, 8, 5), (3, 8, 5)] if names[2] == 5 else OTHERS, weighted=weighted)


def norms_of(**of):
    import torch

    class Norms(torch.nn.Module):
        def forward(self, x, dy, weights, scale, gamma, beta, mean, var):
            return tuple(all_norms(x, dy, weights, scale, gamma, beta, mean, var, **of))

    return Norms(), tuple(torch.from_numpy(each) for each in arguments(TRACED))


def run_torch(function):
    import torch

    def run(*given):
        return [each.detach().numpy() for each in function(*(torch.from_numpy(each) for each in given))]

    return run


def dynamic():
    import torch

    n, length = torch.export.Dim("n"), torch.export.Dim("l")
    return ({0: n, 2: length},) * 2 + ({0: n},) * 2 + (None,) * 4


@pytest.mark.cells("torch-cpu")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_of_torch_takes_all_sizes(strict):
    import torch

    of = {
        "norms": NORMS[strict::3],
        "weighted": WEIGHTED[strict : strict + 1],
    }  # some of them each: to export takes long
    module, given = norms_of(**of)
    module(*given)  # the first call of a process keeps the library, of which Dynamo warns
    check(run_torch(torch.export.export(module, given, dynamic_shapes=dynamic(), strict=strict).module()), **of)


@pytest.mark.cells("torch-cpu")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_of_torch_takes_all_sizes():
    import torch

    module, given = norms_of()
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(module, given, check_trace=False)
    check(run_torch(traced))


@pytest.mark.cells("jax")
def test_an_exported_function_of_jax_takes_all_sizes(backend):
    import jax
    from jax import export

    def differentiated(x, dy, *others):
        found, grown = all_norms(x, dy, *others), []
        for norm, options, kind in NORMS:
            params = parameters_of(norm, kind, *others[1:4])
            grown.append(jax.vjp(lambda x, norm=norm, of=params, how=options: norm(x, *of, **how), x)[1](dy)[0])
        return found, grown

    free, fixed = export.symbolic_shape("n, 8, l"), (CHANNELS,)
    shapes = [free] * 2 + [(free[0], 1, 1), (*free[:2], 1)] + [fixed] * 4
    shapes = [jax.ShapeDtypeStruct(shape, np.float64) for shape in shapes]
    exported = export.export(jax.jit(differentiated))(*shapes)
    check(lambda *given: exported.call(*given)[0])
    given = arguments(OTHERS[0])
    for (norm, options, kind), found in zip(NORMS, exported.call(*given)[1], strict=True):
        params = parameters_of(norm, kind, *given[3:6])
        np.testing.assert_allclose(found, exact(norm, *given[:2], *params, **options).dx.astype(float), atol=1e-9)
