"""PyTorch's autograd where it alone records: one node, what it saves, and derivatives of any order.

What it must give is what autograd makes of the primitives that the kernels are written in: `composed`.
"""

from functools import partial
from itertools import accumulate, product

import inner
import numpy as np
import pytest
from oracles import CASES

import anynorm

pytestmark = [
    pytest.mark.cells("torch"),
    pytest.mark.untracked,  # these tests say for themselves what requires a gradient
    # torch's own code, as its forward mode loads it
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


@pytest.fixture
def torch(backend):
    return backend.xp


@pytest.fixture
def composed(monkeypatch):
    """Runs a function with autograd recording every primitive."""

    def run(function, *arrays):
        with monkeypatch.context() as patch:
            inner.record_primitives(patch)
            return function(*arrays)

    return run


def arguments(backend, case, seed=0, dtype=None):
    """x and its parameters, all of which require a gradient, and a cotangent."""
    rng = np.random.default_rng(seed)
    numbers = [rng.standard_normal(case.shape), *rng.standard_normal((case.parameters, *case.parameter_shape))]
    arrays = [backend.array(each, dtype).requires_grad_() for each in numbers]
    return arrays, backend.array(rng.standard_normal(case.shape), dtype)


def calling(case, **more):
    return lambda *arrays: case.norm(*arrays, **case.options, **more)


def nodes(y):
    """The names of the nodes of y's graph."""
    found, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [each for each, _ in node.next_functions]
    return {node.name().partition("Backward")[0] for node in found}


def assert_same(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        limits = {"rtol": 1e-9, "atol": 1e-9} | tolerance
        np.testing.assert_allclose(one.detach().cpu(), other.detach().cpu(), **limits)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_norm_is_one_node_among_reshapes(backend, torch, case):
    arrays, dy = arguments(backend, case)
    y = calling(case)(*arrays)
    assert nodes(y) <= {"Normalize", "View", "ReshapeAlias", "UnsafeView", "torch::autograd::AccumulateGrad"}
    assert not calling(case)(*[each.detach() for each in arrays]).requires_grad
    with torch.no_grad():
        assert not calling(case)(*arrays).requires_grad
    with torch.inference_mode():
        assert calling(case)(*arrays).is_inference()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_right_for_each_choice_of_what_requires_one(backend, torch, composed, case):
    arrays, dy = arguments(backend, case)
    expected = torch.autograd.grad(composed(calling(case), *arrays), arrays, dy)
    for chosen in product([False, True], repeat=len(arrays)):
        if not any(chosen):
            continue
        some = [each.detach().requires_grad_(wanted) for each, wanted in zip(arrays, chosen, strict=True)]
        y = calling(case)(*some)
        assert "Normalize" in nodes(y)
        wanted = [each for each in some if each.requires_grad]
        assert_same(
            torch.autograd.grad(y, wanted, dy),
            [each for each, wanted in zip(expected, chosen, strict=True) if wanted],
        )
        if len(wanted) in (1 + CASES.index(case) % 3, len(arrays)):
            assert torch.autograd.gradgradcheck(calling(case), some, dy.requires_grad_())
            dy = dy.detach()


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_the_third_derivative_is_that_of_the_primitives(backend, torch, composed, case):
    arrays, dy = arguments(backend, case)

    def third(*arrays):
        y = calling(case)(*arrays)
        for _ in range(2):
            y = sum((each**2).sum() for each in torch.autograd.grad((y**3 * dy).sum(), arrays, create_graph=True))
        return torch.autograd.grad(y, arrays)

    assert_same(third(*arrays), composed(third, *arrays), rtol=1e-7)


@pytest.mark.parametrize(("shape", "offset"), [((16384, 2), 1e6), ((16384, 2, 3), 1e4), ((6, 2, 8192), 0.0)], ids=str)
def test_a_gradient_that_is_recorded_is_exact_over_many_rows(backend, torch, shape, offset):
    rng = np.random.default_rng(2)
    x = backend.array(rng.standard_normal(shape) + offset, "float32").requires_grad_()
    gamma, dy = (backend.array(rng.standard_normal(size), "float32") for size in (2, shape))

    def gradients(*arrays, **more):
        arrays = [each.detach().requires_grad_() for each in arrays]
        return torch.autograd.grad(anynorm.batch_norm(*arrays), arrays, dy.to(arrays[0].dtype), **more)

    expected = gradients(x.double(), gamma.double())
    for found in (gradients(x, gamma, create_graph=True), gradients(x, gamma)):
        assert_same(
            [each / of.abs().max() for each, of in zip(found, expected, strict=True)],
            [of / of.abs().max() for of in expected],
            rtol=0,
            atol=5e-6,
        )


def test_given_moments_are_constants_and_x_is_not_kept_without_need(backend, torch, composed):
    rng = np.random.default_rng(2)
    x, gamma, beta = (backend.array(rng.standard_normal(s)) for s in ((4, 3, 5), 3, 3))
    given = anynorm.Moments(backend.array(rng.standard_normal(3)), backend.array(rng.random(3)), 5)

    def norm(*arrays):
        return anynorm.batch_norm(*arrays, moments=given)

    inputs = (x.requires_grad_(), gamma.requires_grad_(), beta.requires_grad_())
    assert torch.autograd.gradcheck(norm, inputs)
    assert torch.autograd.gradgradcheck(norm, inputs)
    with saved(torch) as shapes:
        y = anynorm.batch_norm(x, gamma.detach(), moments=given, return_moments=True)[0]
    assert x.shape not in shapes
    dy = torch.ones_like(y)
    assert_same(
        torch.autograd.grad(y, x, dy),
        composed(lambda x: torch.autograd.grad(norm(x, gamma.detach()), x, dy), x),
    )


def test_moments_that_require_a_gradient_get_one(backend, torch):
    x, mean, var = (backend.array(np.full(n, 2.0)).requires_grad_() for n in ((4, 3), 3, 3))
    y = anynorm.batch_norm(x, moments=anynorm.Moments(mean, var, 4), eps=0)
    (found,) = torch.autograd.grad(y.sum(), mean)
    assert_same([found], [torch.full_like(mean, -4 / 2**0.5)])


def saved(torch):
    """A context that lists the shapes of what is saved in it."""
    shapes = []

    class Saved(torch.autograd.graph.saved_tensors_hooks):
        def __enter__(self):
            super().__enter__()
            return shapes

    return Saved(lambda each: shapes.append(each.shape) or each, lambda each: each)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_x_gamma_and_the_statistics_are_all_that_is_saved(backend, torch, case):
    arrays, dy = arguments(backend, case)
    with saved(torch) as shapes:
        calling(case)(*arrays)
    centred = case.norm not in (anynorm.rms_norm, anynorm.weight_norm)
    groups = len({case.set_of(index) for index in np.ndindex(*case.shape)})
    kept = [] if case.norm is anynorm.center else [arrays[0].numel(), arrays[1].numel()]
    assert sorted(map(np.prod, shapes)) == sorted(kept + [groups] * (1 + 2 * centred))
    with saved(torch) as shapes:
        calling(case)(*[each.detach() for each in arrays[:-1]], arrays[-1])
    if case.norm is not anynorm.weight_norm:  # beta alone: its gradient is a sum of cotangents
        assert arrays[0].numel() not in map(np.prod, shapes)


def peak(torch, device, step):
    """The most memory that `step` holds at one time beyond what was there, in bytes."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    return max(accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())))


@pytest.mark.parametrize("shape", [(4, 64, 128, 128), (64, 64, 32, 32)])
def test_inference_needs_little_more_than_its_result(backend, torch, shape, monkeypatch):
    inner.take_no_memory_of_numpy(monkeypatch)
    x = torch.randn(shape, device=backend.device)
    moments = anynorm.moments(x, axis=(0, 2, 3))
    gamma, beta = torch.randn(2, 64, device=backend.device)

    def step():
        anynorm.batch_norm(x, gamma, beta, moments=moments)

    step()
    most = 2**21 if backend.device.type == "cpu" else 2 * x.nbytes + 2**16
    assert peak(torch, backend.device, step) < x.nbytes + most


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_holds_less_memory_than_the_primitives(backend, torch, composed, dtype, monkeypatch):
    inner.take_no_memory_of_numpy(monkeypatch)
    x = torch.randn(64, 64, 32, 32, device=backend.device, dtype=backend.dtype(dtype), requires_grad=True)
    gamma = torch.ones(64, device=backend.device, requires_grad=True)
    size = x.numel() * x.element_size()
    for norm, options in ((anynorm.batch_norm, {}), (anynorm.group_norm, {"groups": 8})):

        def forward(norm=norm, options=options):
            return norm(x, gamma, **options)

        def step(forward=forward):
            y = forward()
            torch.autograd.grad(y, (x, gamma), y)

        if backend.device.type == "cpu":
            step()  # what torch allocates once
            assert peak(torch, backend.device, step) < 0.8 * composed(peak, torch, backend.device, step)
            y = forward()
            backward = partial(torch.autograd.grad, y, (x, gamma), y)
            assert peak(torch, backend.device, backward) < size + 2**23
        kept = held(torch, backend.device, forward)
        assert size <= kept < 1.1 * size
        assert composed(held, torch, backend.device, forward) > 3 * size


def held(torch, device, function):
    """The memory that stays where the result of `function` is held, in bytes."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        result = function()
        return torch.cuda.memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    assert result is not None
    return sum(each.nbytes() for each in profile.profiler.kineto_results.events() if each.name() == "[memory]")


def test_an_array_that_was_written_to_after_the_forward_is_an_error(backend, torch):
    for norm, options in ((anynorm.layer_norm, {"axis": 1}), (anynorm.group_norm, {"groups": 2})):
        for position in range(2):
            numbers = [np.random.default_rng(3).standard_normal(shape) for shape in ((3, 4), 4)]
            arrays = [backend.array(each).requires_grad_() for each in numbers]
            y = norm(*arrays, **options)
            with torch.no_grad():
                arrays[position].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


@pytest.mark.parametrize("number", [3, 6000], ids=["whole", "in blocks"])
def test_the_pullback_of_an_x_that_is_not_recorded_records_nothing(backend, torch, number):
    x, dy = map(backend.array, np.random.default_rng(16).standard_normal((2, number, 6)))
    (expected,) = anynorm.vjp(anynorm.layer_norm, x)[1](dy)
    with torch.no_grad():
        _, pullback = anynorm.vjp(anynorm.layer_norm, x.requires_grad_())
    (found,) = pullback(dy)
    assert not found.requires_grad
    backend.check(found, backend.numpy(expected), tolerance=0)


def test_moments_may_be_written_to_before_the_backward(backend, torch):
    x, dy = map(backend.array, np.random.default_rng(3).standard_normal((2, 3, 4)))
    gradients = []
    for factor in (1, 3 / 2):
        leaf = x.detach().requires_grad_()
        y, batch = anynorm.batch_norm(leaf, return_moments=True)
        batch.mean.mul_(factor)
        batch.var.mul_(factor)
        gradients += torch.autograd.grad(y, leaf, dy)
    backend.check(gradients[1], backend.numpy(gradients[0]), tolerance=0)


@pytest.mark.cells("torch-cpu")  # on a GPU they are copied
def test_weights_that_were_written_to_after_the_forward_are_an_error(backend, torch):
    x = backend.array(np.random.default_rng(3).standard_normal((3, 4))).requires_grad_()
    mask = x.detach() > 0
    y = anynorm.layer_norm(x, weights=mask)
    mask.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_the_result_may_be_written_to(backend, torch, composed, case):
    arrays, dy = arguments(backend, case)

    def gradients(*arrays):
        y = calling(case)(*arrays)
        y.mul_(2).relu_()
        return torch.autograd.grad(y, arrays, dy)

    assert_same(gradients(*arrays), composed(gradients, *arrays))


def test_the_graph_is_freed_and_may_be_kept(backend, torch):
    x = backend.array(np.random.default_rng(4).standard_normal((3, 4))).requires_grad_()
    y = anynorm.layer_norm(x).pow(2).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    assert_same(torch.autograd.grad(y, x), [first], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


def test_function_transforms_give_what_autograd_gives(backend, torch):
    case = next(case for case in CASES if case.norm is anynorm.group_norm)
    (x, gamma, beta), dy = arguments(backend, case)
    func, norm = torch.func, calling(case)

    def loss(*arrays):
        return (norm(*arrays) ** 3 * dy).sum()

    plain = [each.detach() for each in (x, gamma, beta)]
    expected = torch.autograd.grad(loss(x, gamma, beta), (x, gamma, beta))
    for each in (plain, (x, gamma, beta)):
        assert_same(func.grad(loss, argnums=(0, 1, 2))(*each), expected)
        y, pullback = func.vjp(norm, *each)
        assert_same(pullback(dy), torch.autograd.grad(norm(x, gamma, beta), (x, gamma, beta), dy))
    jacobian = torch.autograd.functional.jacobian(norm, tuple(plain))
    assert_same(func.jacrev(norm, argnums=(0, 1, 2))(*plain), jacobian)
    assert_same(func.jacfwd(norm, argnums=(0, 1, 2))(*plain), jacobian)
    assert_same(torch.autograd.functional.jacobian(norm, tuple(plain), vectorize=True), jacobian)
    _, tangent = func.jvp(norm, tuple(plain), (dy, *plain[1:]))
    expected = sum(torch.tensordot(j, t, t.ndim) for j, t in zip(jacobian, (dy, *plain[1:]), strict=True))
    assert_same([tangent], [expected])
    hessian = torch.autograd.functional.hessian(loss, tuple(plain))
    for found, row in zip(func.hessian(loss, argnums=(0, 1, 2))(*plain), hessian, strict=True):
        assert_same(found, row, atol=1e-7)
    stacked = torch.stack([x, x + 1, x * 2])
    each = torch.stack([norm(one, gamma, beta) for one in stacked])
    assert_same([func.vmap(norm, in_dims=(0, None, None))(stacked, gamma, beta)], [each])


def test_many_cotangents_may_be_pulled_back_at_once(backend, torch):
    case = next(case for case in CASES if case.norm is anynorm.batch_norm)
    arrays, dy = arguments(backend, case)
    y, many = calling(case)(*arrays), torch.stack([dy, dy * 2, dy - 1])
    together = torch.autograd.grad(y, arrays, many, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(y, arrays, each, retain_graph=True) for each in many]
    assert_same(together, [torch.stack(each) for each in zip(*apart, strict=True)])


def test_forward_mode_takes_arrays_that_require_a_gradient(backend, torch):
    forward_ad = torch.autograd.forward_ad
    case = next(case for case in CASES if case.norm is anynorm.layer_norm)
    arrays, tangent = arguments(backend, case)
    with forward_ad.dual_level():
        y = calling(case)(forward_ad.make_dual(arrays[0], tangent), *arrays[1:])
        found = forward_ad.unpack_dual(y).tangent
    _, expected = torch.func.jvp(lambda x: calling(case)(x, *arrays[1:]), (arrays[0],), (tangent,))
    assert_same([found], [expected])
    # of the gradient: forward over reverse
    (x, *parameters), dy = arguments(backend, case)
    with forward_ad.dual_level():
        y = calling(case)(forward_ad.make_dual(x, tangent), *parameters)
        (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        found = forward_ad.unpack_dual(dx).tangent
    expected = torch.autograd.functional.hvp(lambda x: (calling(case)(x, *parameters) ** 3).sum(), x, tangent)[1]
    assert_same([found], [expected])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(backend, torch, reentrant):
    case = next(case for case in CASES if case.norm is anynorm.instance_norm)
    arrays, dy = arguments(backend, case)
    expected = torch.autograd.grad(calling(case)(*arrays), arrays, dy)
    torch.utils.checkpoint.checkpoint(calling(case), *arrays, use_reentrant=reentrant).backward(dy)
    assert_same([each.grad for each in arrays], expected)
    with torch.autograd.graph.save_on_cpu():
        y = calling(case)(*arrays)
    assert_same(torch.autograd.grad(y, arrays, dy), expected)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "float64"), ("float32", "float64")])
def test_gradients_have_the_dtype_of_what_they_are_gradients_of(backend, torch, composed, dtypes):
    rng = np.random.default_rng(5)
    x, gamma, beta = (
        backend.array(rng.standard_normal(s), d).requires_grad_()
        for s, d in zip(((6, 8), 8, 8), (*dtypes, dtypes[0]), strict=True)
    )
    dy = backend.array(rng.standard_normal((6, 8)), dtypes[0])

    def gradients(*arrays):
        return torch.autograd.grad(anynorm.layer_norm(*arrays), arrays, dy)

    found, expected = gradients(x, gamma, beta), composed(gradients, x, gamma, beta)
    assert [each.dtype for each in found] == [x.dtype, gamma.dtype, beta.dtype]
    assert_same([each.double() for each in found], [each.double() for each in expected], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["permuted", "expanded", "strided", "channels last", "empty", "no rows", "one value"])
def test_any_strides_and_sizes_will_do(backend, torch, composed, name):
    base = backend.array(np.random.default_rng(6).standard_normal((4, 6, 5, 3)))
    x = {
        "permuted": base.permute(3, 1, 0, 2),
        "expanded": base[:1].expand(4, 6, 5, 3),
        "strided": base[:, :, ::2],
        "channels last": base.to(memory_format=torch.channels_last),
        "empty": base[:, :, :0],
        "no rows": base[:0],
        "one value": base[:1, :, :1, :1],
    }[name].requires_grad_()
    gamma = backend.array(np.linspace(1, 2, 6)).requires_grad_()
    for norm, options in ((anynorm.batch_norm, {}), (anynorm.group_norm, {"groups": 3}), (anynorm.instance_norm, {})):

        def gradients(x, gamma, norm=norm, options=options):
            return torch.autograd.grad((norm(x, gamma, **options) ** 3).sum(), (x, gamma))

        found = gradients(x, gamma)
        assert [each.shape for each in found] == [x.shape, gamma.shape]
        assert_same(found, composed(gradients, x, gamma))


def test_arrays_without_numbers_have_gradients_without_numbers(backend, torch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mode, device in ((FakeTensorMode(), "cpu"), (torch.device("meta"), "meta")):
        with mode:
            x = torch.empty(4, 6, device=device, requires_grad=True)
            y = anynorm.layer_norm(x)
            (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            (dx,) = torch.autograd.grad(dx.sum(), x)
        assert (dx.shape, dx.device) == (x.shape, x.device)


def test_autocast_rounds_nothing(backend, torch):
    if backend.device.type != "cpu":
        pytest.skip(reason="arrays on a GPU are run whole")
    x, dy = torch.randn(2, 512, 96, device=backend.device)
    gamma, beta = torch.randn(2, 96, device=backend.device)

    def gradients():
        return anynorm.vjp(anynorm.layer_norm, x, gamma, beta)[1](dy)

    expected = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found, each in zip(gradients(), expected, strict=True):
            assert torch.equal(found, each)
        assert torch.is_autocast_enabled("cpu")


def test_autocast_changes_no_dtype(backend, torch):
    x = backend.array(np.random.default_rng(7).standard_normal((4, 6)), "float32").requires_grad_()
    expected = anynorm.layer_norm(x)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        y = anynorm.layer_norm(x)
        (inside,) = torch.autograd.grad(y, x, expected.detach(), retain_graph=True)
    (outside,) = torch.autograd.grad(y, x, expected.detach())
    assert_same([y, inside], [expected, outside], rtol=0, atol=0)


def test_subclasses_and_parameters_stay_what_they_are(backend, torch):
    class Named(torch.Tensor):
        pass

    x = torch.randn(4, 6, device=backend.device)
    y = anynorm.layer_norm(x.as_subclass(Named).requires_grad_())
    assert type(y) is Named
    assert "Normalize" in nodes(y)
    parameter = torch.nn.Parameter(x)
    y = anynorm.weight_norm(parameter, torch.nn.Parameter(torch.ones(4, device=backend.device)))
    assert type(y) is torch.Tensor
    y.sum().backward()
    assert parameter.grad.shape == (4, 6)


def test_results_are_those_without_autograd_to_the_last_bit(backend, torch):
    for case in CASES:
        arrays, _ = arguments(backend, case, dtype="float32")
        assert torch.equal(calling(case)(*arrays), calling(case)(*[each.detach() for each in arrays]))
