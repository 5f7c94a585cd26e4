"""Every norm is the formula of its paper, on every library, with every kind of gamma and beta."""

import numpy as np
import pytest
from oracles import CASES, Case, only_if, values

import anynorm


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


def parameters(case, rng, kind):
    """gamma and beta, short or of x's rank."""
    if kind == "short":
        shapes = [case.parameter_shape, case.parameter_shape]
    else:
        shapes = [(case.shape[0], *(1,) * (len(case.shape) - 1)), case.shape]
    return [rng.standard_normal(shape) for shape in shapes[: case.parameters]]


@pytest.mark.parametrize("kind", ["short", "full-rank"])
def test_norm_is_the_formula_of_its_paper(backend, case, kind):
    only_if(kind == "short" or CASES.index(case) % 3 == 0, backend, "jax")
    rng = np.random.default_rng(0)
    x, params = rng.standard_normal(case.shape) * 3 + 5, parameters(case, rng, kind)
    y = case.norm(backend.array(x), *map(backend.array, params), **case.options)
    backend.check(y, values(case, x, *params, *[None] * (2 - len(params))))


@pytest.mark.parametrize("has_gamma", [True, False])
@pytest.mark.parametrize("has_beta", [True, False])
@pytest.mark.parametrize("case", [case for case in CASES if case.parameters == 2], ids=str)
def test_gamma_and_beta_are_each_optional(backend, case, has_gamma, has_beta):
    rng = np.random.default_rng(1)
    x, (gamma, beta) = rng.standard_normal(case.shape), parameters(case, rng, "short")
    gamma, beta = gamma if has_gamma else None, beta if has_beta else None
    options = {name: backend.array(each) for name, each in (("gamma", gamma), ("beta", beta)) if each is not None}
    backend.check(case.norm(backend.array(x), **options, **case.options), values(case, x, gamma, beta))


def test_result_has_the_dtype_of_x_whatever_the_parameters_have(backend, case):
    only_if(CASES.index(case) % 3 == 0, backend, "jax")
    rng = np.random.default_rng(2)
    numbers, params = rng.standard_normal(case.shape), parameters(case, rng, "short")
    for dtype in backend.narrow:
        x = backend.array(numbers, dtype)
        expected = values(case, backend.numpy(x), *params, *[None] * (2 - len(params)))
        y = case.norm(x, *map(backend.array, params), **case.options)
        ulp = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2e-6}[dtype]
        backend.check(y, expected, dtype=dtype, tolerance=ulp)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.norm not in (anynorm.rms_norm, anynorm.weight_norm)], ids=str
)
def test_returned_moments_are_mean_and_biased_variance_of_each_set(backend, case):
    x = np.random.default_rng(3).standard_normal(case.shape)
    y, moments = case.norm(backend.array(x), return_moments=True, **case.options)
    sets = {}
    for index in np.ndindex(*case.shape):
        sets.setdefault(case.set_of(index), []).append(x[index])
    numbers = list(sets.values())  # in the order of the kept axes, as the sets of an array are met in that order
    backend.check(y, values(case, x, None, None))
    for moment, expected in (
        (moments.mean, [np.mean(each) for each in numbers]),
        (moments.var, [np.var(each) for each in numbers]),
    ):
        backend.check(moment, np.reshape(expected, tuple(moment.shape)))
    assert moments.count == len(numbers[0])
    assert not getattr(moments.mean, "requires_grad", False)
    assert not getattr(moments.var, "requires_grad", False)


def test_moments_function_gives_the_moments_of_normalize(backend):
    x = backend.array(np.random.default_rng(4).standard_normal((4, 3, 5)))
    _, expected = anynorm.normalize(x, axis=(0, 2), return_moments=True)
    found = anynorm.moments(x, axis=(0, 2))
    tolerance = 1e-15 if backend.tracked else 0  # autograd's node may take a way of its own
    backend.check(found.mean, backend.numpy(expected.mean), tolerance=tolerance)
    backend.check(found.var, backend.numpy(expected.var), tolerance=tolerance)
    assert found.count == expected.count == 20


@pytest.mark.parametrize("state", [anynorm.Moments, anynorm.RunningStats])
@pytest.mark.parametrize(
    "case",
    [
        Case(anynorm.batch_norm, (4, 3, 2), {}, lambda i: i[1], lambda i: (i[1],), (3,)),
        Case(anynorm.batch_norm, (4, 2, 3), {"channel_axis": 2}, lambda i: i[2], lambda i: (i[2],), (3,)),
        Case(anynorm.normalize, (4, 3), {"axis": 0}, lambda i: i[1], lambda i: (i[0],), (4,)),
    ],
    ids=str,
)
def test_given_moments_are_used_in_place_of_its_own(backend, case, state):
    rng = np.random.default_rng(5)
    x, gamma, beta = (rng.standard_normal(shape) for shape in (case.shape, *[case.parameter_shape] * 2))
    mean, var = rng.standard_normal(3), rng.random(3)
    given = state(backend.array(mean), backend.array(var), 7)
    arrays = map(backend.array, (x, gamma, beta))
    y, used = case.norm(*arrays, moments=given, return_moments=True, **case.options)
    backend.check(y, values(case, x, gamma, beta, given=dict(enumerate(zip(mean, var, strict=True)))))
    assert used is given


@pytest.mark.cells("torch")
def test_batch_norm_is_the_code_example_of_the_summary(backend):
    torch = backend.xp
    rng = np.random.default_rng(6)
    X = backend.array(rng.standard_normal((8, 3, 4, 5)) * 2 + 1)
    gamma, beta = (backend.array(rng.standard_normal((1, 3, 1, 1))) for _ in range(2))
    moving_mean, moving_var, momentum, eps = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1), 0.9, 1e-5
    moving_mean, moving_var = (each.to(X) for each in (moving_mean, moving_var))
    running = anynorm.RunningStats.init(3, like=X, momentum=momentum)

    # as printed, names included
    mean = X.mean(dim=(0, 2, 3), keepdim=True)
    var = ((X - mean) ** 2).mean(dim=(0, 2, 3),
                                  keepdim=True)  # fmt: skip
    X_hat = (X - mean) / torch.sqrt(var + eps)
    # moving averages of mean and var are for test
    moving_mean = momentum * moving_mean + (1 - momentum) * mean
    moving_var = momentum * moving_var + (1 - momentum) * var
    Y = gamma * X_hat + beta

    y, batch = anynorm.batch_norm(X, gamma, beta, eps=eps, return_moments=True)
    running = running.update(batch)
    backend.check(y, backend.numpy(Y))
    backend.check(running.mean, backend.numpy(moving_mean)[0, :, 0, 0])
    backend.check(running.var, backend.numpy(moving_var)[0, :, 0, 0])


def test_equation_1_with_expectations_written_out(backend):
    x, gamma, beta, eps = [0.5, -1.0, 2.0, 4.0], 1.5, -0.25, 1e-3
    mean = (0.5 - 1.0 + 2.0 + 4.0) / 4
    var = sum((value - mean) ** 2 for value in x) / 4
    expected = [(value - mean) / (var + eps) ** 0.5 * gamma + beta for value in x]
    y = anynorm.normalize(backend.array(x), backend.array([gamma]), backend.array([beta]), axis=0, eps=eps)
    backend.check(y, np.array(expected))


@pytest.mark.parametrize("equation", [2, 3])
def test_equations_2_and_3_summed_as_printed_with_sigma_squared_for_sigma(backend, equation):
    T, C, W, H, eps = 2, 3, 2, 4, 1e-5
    x = np.random.default_rng(7).standard_normal((T, C, W, H))
    y = np.empty_like(x)
    for t in range(T):
        for i in range(C):
            samples = range(T) if equation == 2 else [t]
            terms = [x[s, i, w, h] for s in samples for w in range(W) for h in range(H)]
            mu = sum(terms) / len(terms)
            sigma_squared = sum((term - mu) ** 2 for term in terms) / len(terms)
            for j in range(W):
                for k in range(H):
                    y[t, i, j, k] = (x[t, i, j, k] - mu) / (sigma_squared + eps) ** 0.5
    norm = anynorm.batch_norm if equation == 2 else anynorm.instance_norm
    backend.check(norm(backend.array(x), eps=eps), y)


def test_equation_4_is_a_vector_of_length_g(backend):
    v, g = [3.0, 4.0, 12.0], 26.0
    w = anynorm.weight_norm(backend.array(v), backend.array(g), axis=None)
    backend.check(w, np.array([6.0, 8.0, 24.0]))
