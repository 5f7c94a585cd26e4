"""PyTorch: its own norms as oracles, its autograd, its transforms and its compiler."""

import subprocess
import sys

import inner
import numpy as np
import pytest
from oracles import exact

import anynorm

pytestmark = [
    pytest.mark.cells("torch"),
    # torch's own code, as its compiler and its forward mode load it
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


def native(torch):
    """torch.nn.functional's norms beside ours."""
    F = torch.nn.functional

    def channels(norm):
        return lambda x, gamma, beta: norm(x, weight=gamma, bias=beta)

    return [
        (anynorm.layer_norm, {"axis": (2, 3)}, (5, 7), lambda x, g, b: F.layer_norm(x, (5, 7), g, b)),
        (anynorm.batch_norm, {}, (6,), channels(lambda x, **o: F.batch_norm(x, None, None, training=True, **o))),
        (anynorm.instance_norm, {}, (6,), channels(F.instance_norm)),
        (anynorm.group_norm, {"groups": 3}, (6,), lambda x, g, b: F.group_norm(x, 3, g, b)),
        (anynorm.rms_norm, {"axis": 3}, (7,), lambda x, g, b: F.rms_norm(x, (7,), g, eps=1e-5) + b),
    ]


@pytest.mark.parametrize("index", range(5), ids=["layer", "batch", "instance", "group", "rms"])
def test_values_and_gradients_are_those_of_torch(backend, index):
    torch = backend.xp
    norm, options, shape, theirs = native(torch)[index]
    rng = np.random.default_rng(0)
    numbers = [rng.standard_normal((4, 6, 5, 7)) + 2, *rng.standard_normal((2, *shape))]
    arrays = [backend.array(each).detach().requires_grad_() for each in numbers]
    dy = backend.array(rng.standard_normal((4, 6, 5, 7))).detach()
    expected = theirs(*arrays)
    backend_gradients = torch.autograd.grad(expected, arrays, dy)
    y, pullback = anynorm.vjp(norm, *arrays, **options)
    assert torch.allclose(y, expected, rtol=1e-11, atol=1e-11)
    recorded = torch.autograd.grad(norm(*arrays, **options), arrays, dy)
    for found in (pullback(dy), recorded):
        for ours, each in zip(found, backend_gradients, strict=True):
            assert torch.allclose(ours, each, rtol=1e-9, atol=1e-10)


def test_inference_and_its_gradient_are_those_of_torch(backend):
    torch = backend.xp
    rng = np.random.default_rng(1)
    x, gamma, beta = (backend.array(rng.standard_normal(s)).detach().requires_grad_() for s in ((4, 3, 5), 3, 3))
    mean, var = backend.array(rng.standard_normal(3)).detach(), backend.array(rng.random(3)).detach()
    expected = torch.nn.functional.batch_norm(x, mean, var, gamma, beta)
    given = anynorm.RunningStats(mean, var)
    y = anynorm.batch_norm(x, gamma, beta, moments=given)
    dy = torch.ones_like(y)
    assert torch.allclose(y, expected)
    gradients = torch.autograd.grad(expected, (x, gamma, beta), dy, retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(y, (x, gamma, beta), dy, retain_graph=True), gradients, strict=True):
        assert torch.allclose(ours, theirs)
    _, pullback = anynorm.vjp(anynorm.batch_norm, x, gamma, beta, moments=given)
    for ours, theirs in zip(pullback(dy), gradients, strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_weight_norm_is_torchs(backend, dim):
    torch = backend.xp
    rng = np.random.default_rng(2)
    v = backend.array(rng.standard_normal((4, 3, 2)))
    shape = [1, 1, 1]
    shape[dim] = v.shape[dim]
    g = backend.array(rng.standard_normal(shape))
    assert torch.allclose(anynorm.weight_norm(v, g, axis=dim), torch._weight_norm(v, g, dim))


def test_function_transforms_work_as_they_do_on_torchs_own(backend):
    torch = backend.xp
    x = backend.array(np.random.default_rng(6).standard_normal((3, 4, 6, 5))).detach()
    gamma = backend.array(np.linspace(1, 2, 6)).detach()

    def ours(x):
        return anynorm.batch_norm(x, gamma)

    def theirs(x):
        return torch.nn.functional.batch_norm(x, None, None, gamma, training=True)

    assert torch.allclose(torch.func.vmap(ours)(x), torch.stack([theirs(each) for each in x]))
    cubed = [lambda x, f=f: f(x).pow(3).sum() for f in (ours, theirs)]
    one, other = (torch.func.grad(f)(x[0]) for f in cubed)
    assert torch.allclose(one, other)
    one = torch.func.vmap(torch.func.grad(cubed[0]))(x)
    assert torch.allclose(one, torch.stack([torch.func.grad(cubed[1])(each) for each in x]))
    small = x[0, :3, :2, :2]
    hessian = torch.func.hessian(lambda x: anynorm.layer_norm(x).pow(3).sum())(small)
    expected = torch.autograd.functional.hessian(lambda x: anynorm.layer_norm(x).pow(3).sum(), small)
    assert torch.allclose(hessian, expected)
    assert torch.func.jvp(anynorm.rms_norm, (x,), (x,))[1].shape == x.shape
    extreme = torch.stack([x[0].float() * 1e30, x[0].float()])
    assert torch.allclose(torch.func.vmap(anynorm.layer_norm)(extreme), anynorm.layer_norm(extreme), atol=1e-5)


def functions(torch, gamma):
    def step(x):
        y, batch = anynorm.batch_norm(x, gamma, return_moments=True)
        running = anynorm.RunningStats.init(6, like=x).update(batch)
        return y, running.mean, running.var

    def backward(x):
        y, pullback = anynorm.vjp(anynorm.layer_norm, x)
        return y, *pullback(x)

    return {
        "layer": anynorm.layer_norm,
        "batch, a training step": step,
        "group": lambda x: anynorm.group_norm(x, gamma, groups=3),
        "rms": anynorm.rms_norm,
        "weight": lambda x: anynorm.weight_norm(x, torch.ones(x.shape[0], dtype=x.dtype, device=x.device)),
        "vjp": backward,
    }


@pytest.mark.untracked
@pytest.mark.parametrize("name", ["layer", "batch, a training step", "group", "rms", "weight", "vjp"])
def test_compiles_to_one_graph(backend, name):
    torch, dynamic = backend.xp, name in ("batch, a training step", "rms", "vjp")
    gamma = torch.linspace(1, 2, 6, device=backend.device)
    function = functions(torch, gamma)[name]
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    function(backend.array(np.zeros((2, 6, 4)), "float32"))  # from the very first call on the library is known
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=keep)
    for n in (3, 5) if dynamic else (3,):
        x = backend.array(np.random.default_rng(n).standard_normal((n, 6, 4)), "float32")
        found, expected = compiled(x), function(x)
        for ours, each in zip(*[v if isinstance(v, tuple) else (v,) for v in (found, expected)], strict=True):
            assert torch.allclose(ours, each, atol=1e-6)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.untracked
def test_the_default_compiler_gives_the_same_numbers(backend):
    torch = backend.xp
    x = backend.array(np.random.default_rng(7).standard_normal((3, 6, 300)) + 1e4, "float32")
    gamma = torch.linspace(1, 2, 6, device=backend.device)
    compiled = torch.compile(lambda x: anynorm.batch_norm(x, gamma), fullgraph=True)
    assert torch.allclose(compiled(x), anynorm.batch_norm(x, gamma), atol=6e-6)


@pytest.mark.untracked
def test_a_compiled_call_is_exact_at_every_magnitude(backend):
    torch = backend.xp

    x = np.random.default_rng(16).standard_normal((6, 500)) * np.array([1, 1e30, 1e-30, 0, 1e37, 1e-36])[:, None]
    x[0] += 1e6
    x[3] = 3.3
    x = x.astype(np.float32)
    function = torch.compile(
        lambda x: anynorm.layer_norm(x, eps=0, return_moments=True), fullgraph=True, backend="eager", dynamic=False
    )
    y, moments = function(backend.array(x, "float32"))
    assert (y.dtype, moments.mean.dtype, moments.var.dtype) == (torch.float32,) * 3
    np.testing.assert_allclose(backend.numpy(y), exact(anynorm.layer_norm, x, x, eps=0).y, atol=3e-6)
    assert (float(moments.mean[3]), float(moments.var[3])) == (np.float32(3.3), 0)


@pytest.mark.cells("torch-cpu")  # elsewhere the compiler differentiates, and does not take the mean of dy away first
@pytest.mark.untracked
@pytest.mark.parametrize(("axis", "kind"), [(1, None), (0, None), (1, "mask"), (0, "real")])
def test_a_compiled_gradient_is_exact_at_every_magnitude(backend, axis, kind):
    torch, rng = backend.xp, np.random.default_rng(17)
    scale = np.expand_dims(np.array([1, 1e30, 1e-30, 1e-6]), axis)
    x = (rng.standard_normal((4, 500) if axis else (500, 4)) * scale).astype(np.float32)
    x.swapaxes(0, 1 - axis)[0] += 1e6
    dy = (rng.standard_normal(x.shape) + 1e4).astype(np.float32)
    gamma, beta = rng.standard_normal((2, x.shape[axis])).astype(np.float32)
    weights = {None: None, "mask": rng.random(x.shape) < 0.6, "real": rng.random(x.shape) ** 40}[kind]
    padding = np.zeros(x.shape, bool)
    if kind == "mask":
        padding = ~weights & (rng.random(x.shape) < 0.5)
        for each in (weights, padding):
            each.swapaxes(0, 1 - axis)[3] = False  # a group without weight is beta
    function = torch.compile(
        lambda x, gamma, beta, weights: anynorm.layer_norm(x, gamma, beta, axis=axis, eps=1e-30, weights=weights),
        fullgraph=True,
        backend="aot_eager",
    )
    arrays = [backend.array(each, "float32") for each in (np.where(padding, np.nan, x), gamma, beta)]
    given = None if weights is None else backend.array(weights, "bool" if kind == "mask" else "float32")
    found = derivatives(torch, function, arrays, backend.array(dy, "float32"), given)
    x, dy = (np.where(padding, 0, each) for each in (x, dy))
    truth = exact(anynorm.layer_norm, x, dy, gamma, beta, axis=axis, eps=1e-30, weights=weights)
    np.testing.assert_allclose(backend.numpy(found[0])[~padding], truth.y[~padding], rtol=3e-6, atol=3e-6)
    for one, other, along in zip(found[1:], (truth.dx, truth.dgamma, truth.dbeta), (axis, None, None), strict=True):
        sizes = np.max(np.abs(other), axis=along, keepdims=True)
        assert np.max(np.abs(backend.numpy(one) - other) / np.where(sizes == 0, 1, sizes)) < 2e-6
    torch._dynamo.reset()


@pytest.mark.cells("torch-cpu")
@pytest.mark.untracked
@pytest.mark.parametrize(
    ("first", "weight"), [(1e10, 1e-30), (3e8, 1e-25), (-1e12, 1e-30), (3e4, 1e-12), (-3.4e38, 0.0)]
)
def test_a_compiled_call_is_that_of_eager_tensors_beside_a_far_number_of_little_weight(backend, first, weight):
    torch = backend.xp
    arrays = [backend.array([[first, 0, 1, 2]], "float32"), *(torch.ones(4) * n for n in (2, 3))]
    weights, dy = backend.array([[weight, 1, 1, 1]], "float32"), torch.arange(1.0, 5)[None, :]

    def function(x, gamma, beta, weights):
        return anynorm.layer_norm(x, gamma, beta, weights=weights, eps=1e-3)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(*(derivatives(torch, f, arrays, dy, weights) for f in (compiled, function)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other[..., 1:].abs().max()))


@pytest.mark.untracked
def test_a_compiled_call_writes_where_out_says(backend):
    torch, x = backend.xp, backend.array(np.arange(6.0).reshape(2, 3), "float32")
    function = torch.compile(lambda x, out: anynorm.layer_norm(x, out=out), fullgraph=True, backend="aot_eager")
    place = torch.empty_like(x)
    assert function(x, place) is place
    torch.testing.assert_close(place, anynorm.layer_norm(x))


@pytest.mark.untracked
def test_weights_of_a_subclass_are_taken_at_any_size(backend):
    torch = backend.xp
    for shape in ((4, 8), (300, 1000)):
        rng = np.random.default_rng(0)
        x, weights = (backend.array(rng.random(shape), "float32") for _ in range(2))
        found = anynorm.layer_norm(x, weights=weights.as_subclass(type("Own", (torch.Tensor,), {})))
        assert type(found).__name__ == "Own"
        torch.testing.assert_close(found.as_subclass(torch.Tensor), anynorm.layer_norm(x, weights=weights))


@pytest.mark.untracked
def test_the_first_call_of_a_process_may_be_compiled(backend):
    code = (
        "import warnings, torch, anynorm\n"
        "warnings.simplefilter('error')\n"
        "f = torch.compile(anynorm.layer_norm, fullgraph=True, backend='eager')\n"
        f"print(f(torch.randn(4, 8, device={str(backend.device)!r})).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "torch.Size([4, 8])", done.stderr


def test_meta_and_inference_tensors_and_parameters_come_in(backend):
    torch = backend.xp
    assert anynorm.layer_norm(torch.empty(4, 6, device="meta")).shape == (4, 6)
    x, gamma = torch.randn(4, 6, device=backend.device), torch.nn.Parameter(torch.ones(6, device=backend.device))
    y = anynorm.layer_norm(x, gamma)
    assert y.requires_grad
    with torch.inference_mode():
        assert torch.equal(anynorm.layer_norm(x, gamma), y)
    last = torch.randn(2, 6, 4, 4, device=backend.device).to(memory_format=torch.channels_last)
    theirs = torch.nn.functional.batch_norm(last, None, None, training=True)
    assert torch.allclose(anynorm.batch_norm(last), theirs, atol=1e-5)


@pytest.mark.parametrize("first", ["inference_mode", "functionalize", "vmap", "jvp", "fake", "mode", "autocast"])
def test_what_a_first_call_keeps_serves_every_later_one(backend, monkeypatch, first):
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch = backend.xp
    x, gamma = torch.randn(4, 6, device=backend.device), torch.randn(6, device=backend.device)

    def derivatives():
        arrays = [each.clone().requires_grad_() for each in (x, gamma)]
        dx, dgamma = torch.autograd.grad((anynorm.layer_norm(*arrays) ** 3).sum(), arrays, create_graph=True)
        return dx, dgamma, *torch.autograd.grad((dx**2).sum() + (dgamma**2).sum(), arrays)

    expected = derivatives()
    inner.forget_plans(monkeypatch)
    if first == "inference_mode":
        with torch.inference_mode():
            anynorm.layer_norm(x, gamma)
    elif first == "functionalize":
        torch.func.functionalize(anynorm.layer_norm)(x, gamma)
    elif first == "vmap":
        torch.func.vmap(anynorm.layer_norm, in_dims=(0, None))(x[None], gamma)
    elif first == "jvp":
        torch.func.jvp(anynorm.layer_norm, (x, gamma), (x, gamma))
    elif first == "fake":
        for mode in (FakeTensorMode(), FakeTensorMode()):
            anynorm.layer_norm(*(mode.from_tensor(each.detach()) for each in (x, gamma)))
    elif first == "mode":  # the arrays are real, what is made of them is not
        with FakeTensorMode(allow_non_fake_inputs=True):
            anynorm.layer_norm(x, gamma)
    else:
        with torch.autocast(backend.device.type, dtype=torch.bfloat16):
            anynorm.layer_norm(x, gamma)
    for found, each in zip(derivatives(), expected, strict=True):
        assert torch.allclose(found, each, rtol=1e-5, atol=1e-6)


def test_a_large_result_starts_at_a_huge_page(backend):
    if backend.device.type != "cpu":
        pytest.skip(reason="a GPU has other pages")
    torch = backend.xp
    x = torch.randn(1025, 1024, device=backend.device)
    y = anynorm.layer_norm(x)
    assert y.data_ptr() % 2**21 == 0
    assert torch.allclose(y, torch.nn.functional.layer_norm(x, (1024,)), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta state:UserWarning")
def test_sparse_tensors_are_refused(backend):
    with pytest.raises(TypeError, match=r"^x must be a plain array, got one that is sparse_coo$"):
        anynorm.layer_norm(backend.xp.eye(3).to_sparse())
    anynorm.layer_norm(backend.xp.eye(3))  # from here on tensors are known by their type
    for layout in ("csr", "csc"):
        with pytest.raises(TypeError, match=rf"^x must be a plain array, got one that is sparse_{layout}$"):
            anynorm.layer_norm(getattr(backend.xp.eye(3), f"to_sparse_{layout}")())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_nested_tensors_are_refused(backend):
    torch = backend.xp
    for layout in (torch.strided, torch.jagged):
        with pytest.raises(TypeError, match="^x must be a plain array, got one that is nested$"):
            anynorm.layer_norm(torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=layout))


def test_a_tensor_that_is_negative_as_a_view_is_moved(backend):
    torch = backend.xp
    mean = torch.tensor([1 + 2j, 3 - 4j], device=backend.device).conj().imag
    moved = anynorm.RunningStats(mean, torch.ones_like(mean)).to(np.ones(1))
    np.testing.assert_array_equal(moved.mean, [-2.0, 4.0])


def test_moments_carry_no_graph(backend):
    x = backend.array(np.ones((4, 3))).detach().requires_grad_()
    _, batch = anynorm.batch_norm(x, return_moments=True)
    (_, other), _ = anynorm.vjp(anynorm.batch_norm, x, return_moments=True)
    for moments in (batch, other, anynorm.moments(x, axis=0)):
        assert moments.mean.grad_fn is None
        assert moments.var.grad_fn is None


def weighted(torch, device, n, kind):
    """x, gamma, beta and weights."""
    generator = torch.Generator().manual_seed(n)
    x, gamma, beta = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(device) for shape in ((n, 6, 4), (6,), (6,))
    )
    weights = torch.rand(n, 1, 4, generator=generator, dtype=torch.float64).to(device)
    weights = {"mask": weights > 0.3, "reals": weights, "integers": (3 * weights).to(torch.int64) + 1}[kind]
    return x, gamma, beta, weights


def derivatives(torch, function, arrays, dy, weights):
    """y and the gradients, by autograd."""
    arrays = [each.clone().requires_grad_() for each in arrays]
    y = function(*arrays, weights)
    return y.detach(), *torch.autograd.grad(y, arrays, dy)


@pytest.mark.untracked
@pytest.mark.parametrize(
    ("norm", "options", "kind", "dynamic"),
    [
        (anynorm.batch_norm, {}, "mask", False),
        (anynorm.layer_norm, {"axis": 1}, "reals", True),
    ],
)
def test_weights_are_an_argument_of_one_graph(backend, norm, options, dynamic, kind):
    torch = backend.xp

    def function(x, gamma, beta, weights):
        return norm(x, gamma, beta, weights=weights, **options)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (3, 5):
        *arrays, weights = weighted(torch, backend.device, n, kind)
        found, expected = (
            derivatives(torch, each, arrays, arrays[0] * 2 - 1, weights) for each in (compiled, function)
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    torch._dynamo.reset()


@pytest.mark.untracked
def test_a_training_step_with_weights_compiles_without_a_warning(backend):
    torch = backend.xp
    x, gamma, _, mask = weighted(torch, backend.device, 3, "mask")

    def step(x, mask, running):
        y, batch = anynorm.batch_norm(x, gamma, weights=mask, return_moments=True)
        running = running.update(batch)
        return y, running.mean, running.var, running.count

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for debias in (False, True):
        running = anynorm.RunningStats.init(6, like=x, debias=debias)
        for one, other in zip(compiled(x, mask, running), step(x, mask, running), strict=True):
            torch.testing.assert_close(one, other)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["mask", "reals", "integers"])
@pytest.mark.parametrize(("norm", "options"), [(anynorm.batch_norm, {}), (anynorm.layer_norm, {"axis": 1})])
def test_function_transforms_take_weights(backend, norm, options, kind):
    torch = backend.xp
    x, gamma, beta, weights = weighted(torch, backend.device, 3, kind)
    xs, every = x + torch.arange(4.0, device=x.device)[:, None, None, None], torch.stack([weights] * 4)
    every[1:3, 1] = 0

    def function(x, weights):
        return norm(x, gamma, beta, weights=weights, **options)

    def cubed(x, weights):
        return function(x, weights).pow(3).sum()

    for values, masks, dims in ((xs, every, (0, 0)), (xs, weights, (0, None)), (x, every, (None, 0))):
        cases = [(values if dims[0] is None else values[i], masks if dims[1] is None else masks[i]) for i in range(4)]
        looped = torch.stack([function(*each) for each in cases])
        torch.testing.assert_close(torch.func.vmap(function, dims)(values, masks), looped)
        looped = torch.stack([derivatives(torch, cubed, each[:1], None, each[1])[1] for each in cases])
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(cubed), dims)(values, masks), looped)
    direction, step = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape), 1e-6
    _, tangent = torch.func.jvp(lambda x: function(x, weights), (x,), (direction,))
    moved = [function(x + sign * step * direction, weights) for sign in (1, -1)]
    torch.testing.assert_close(tangent, (moved[0] - moved[1]) / (2 * step), atol=1e-6, rtol=1e-6)


@pytest.mark.untracked
@pytest.mark.parametrize("shape", [(2, 4, 0), (2, 0, 4), (0, 4, 2)], ids=str)
@pytest.mark.parametrize(
    ("norm", "options"),
    [
        (anynorm.layer_norm, {}),
        (anynorm.rms_norm, {"axis": None}),
        (anynorm.batch_norm, {}),
        (anynorm.instance_norm, {}),
        (anynorm.group_norm, {"groups": 2}),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_function_transforms_take_an_empty_axis(backend, norm, options, shape):
    import torch

    for masked in (None, shape, (*shape[:-1], 1)):
        weights = None if masked is None else torch.ones(masked, dtype=torch.bool)
        values = [torch.zeros(shape, dtype=torch.float64), *torch.ones((2, *(1,) * len(shape)), dtype=torch.float64)]

        def function(*values, weights=weights):
            return norm(*values, weights=weights, **options)

        gradients = torch.func.grad(lambda *values: function(*values).sum(), (0, 1, 2))(*values)
        assert [each.shape for each in gradients] == [each.shape for each in values]
        assert not any(torch.any(each != 0) for each in gradients)
        assert torch.func.jvp(function, tuple(values), tuple(values))[1].shape == shape
        mapped = torch.func.vmap(function, (0, None, None))(torch.zeros((3, *shape), dtype=torch.float64), *values[1:])
        assert mapped.shape == (3, *shape)
        leaves = [each.requires_grad_() for each in values]
        first = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        assert not any(torch.any(each != 0) for each in first)


@pytest.mark.untracked
def test_an_empty_array_of_numpy_may_be_written_to(backend):
    import torch

    x, out = (torch.from_numpy(np.zeros((2, 0, 3))) for _ in range(2))
    assert anynorm.batch_norm(x, out=out) is out
    with pytest.raises(ValueError, match="out must be writeable"):
        anynorm.layer_norm(torch.zeros(2, 3), out=torch.zeros(1, 3).expand(2, 3))


def test_a_pullback_of_blocks_may_be_traced(backend):
    torch = backend.xp
    x, dy = torch.randn(2, 6000, 6, dtype=torch.float64, device=backend.device)
    pullback = anynorm.vjp(anynorm.layer_norm, x)[1]
    traced = torch.compile(lambda dy: pullback(dy)[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(dy), pullback(dy)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # and this
@pytest.mark.parametrize("in_place", [False, True])
def test_sums_over_replicas_are_transformed_and_break_the_graph_of_a_compiler(backend, in_place):
    torch = backend.xp
    x, gamma, beta, mask = weighted(torch, backend.device, 3, "mask")

    def all_reduce(array):  # the other replica has the same numbers
        if not in_place:
            return array * 2
        array *= 2
        return None

    def function(x, gamma, beta, mask=mask):
        return anynorm.batch_norm(x, gamma, beta, weights=mask, all_reduce=all_reduce)

    def cubed(x, gamma, beta):
        return function(x, gamma, beta).pow(3).sum()

    torch.testing.assert_close(function(x, gamma, beta), anynorm.batch_norm(x, gamma, beta, weights=mask))
    expected = derivatives(torch, lambda *arrays: cubed(*arrays[:3]), (x, gamma, beta), None, None)[1:]
    for found, each in zip(torch.func.grad(cubed, (0, 1, 2))(x, gamma, beta), expected, strict=True):
        torch.testing.assert_close(found, each)
    xs = torch.stack([x, x * 2 + 1])
    mapped = torch.func.vmap(torch.func.grad(cubed, (0, 1, 2)), (0, None, None))(xs, gamma, beta)
    for i in range(2):
        for found, each in zip(mapped, torch.func.grad(cubed, (0, 1, 2))(xs[i], gamma, beta), strict=True):
            torch.testing.assert_close(found[i], each)
    _, tangent = torch.func.jvp(lambda x: function(x, gamma, beta), (x,), (x,))
    moved = [function(x + step * x, gamma, beta) for step in (1e-6, -1e-6)]
    torch.testing.assert_close(tangent, (moved[0] - moved[1]) / 2e-6, atol=1e-6, rtol=1e-6)
    # PyTorch 2.11 cannot build tuples again that a graph breaks at
    if in_place and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
        compiled = torch.compile(function, backend="eager")
        found, expected = (derivatives(torch, each, (x, gamma, beta), x * 2 - 1, mask) for each in (compiled, function))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        torch._dynamo.reset()
