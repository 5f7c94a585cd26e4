"""The norms are the equations and the code of the summary, as they are printed."""

import numpy as np
import pytest

import anynorm


def test_moments_function_gives_the_moments_of_normalize(backend):
    x = backend.array(np.random.default_rng(4).standard_normal((4, 3, 5)))
    _, expected = anynorm.normalize(x, axis=(0, 2), return_moments=True)
    found = anynorm.moments(x, axis=(0, 2))
    tolerance = 1e-15 if backend.tracked else 0  # autograd's node may take a way of its own
    backend.check(found.mean, backend.numpy(expected.mean), tolerance=tolerance)
    backend.check(found.var, backend.numpy(expected.var), tolerance=tolerance)
    assert found.count == expected.count == 20


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
