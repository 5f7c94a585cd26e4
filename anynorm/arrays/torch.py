"""What PyTorch does its own way: autograd, transforms, threads, and the operations that it is fast at."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np

from anynorm.arrays.library import BLOCK, WRITTEN_OUT, Library
from anynorm.kernels import PURE, Array, Namespace, Ops

REPEATED = 4
"""So often is an array used that is worth writing out along its rows."""
HUGE = 2**21
"""The bytes of a huge page."""
LARGE = 2**22
"""From so many bytes on the pages of a new array cost more than the norm, unless they are huge."""


def torch_library(xp: Namespace) -> Library:
    """PyTorch, whose array API is in `xp`."""
    torch = sys.modules["torch"]
    if not torch.compiler.is_compiling():
        _nodes()
    return Library(
        name="torch",
        xp=xp,
        readable=_readable,
        constant=lambda x: x.detach(),
        most=lambda x: float((x.detach() if x.requires_grad else x).max()),
        least=lambda x: float((x.detach() if x.requires_grad else x).min()),
        block=BLOCK,
        plain_block=None,
        device=lambda x: x.device,
        kind=lambda x: (x.device, x.layout),
        quiet=nullcontext,
        oddity=lambda x: (
            "nested" if x.is_nested else "" if x.layout is torch.strided else str(x.layout)[len("torch.") :]
        ),
        traced=torch.compiler.is_compiling,
        contiguous=lambda x: type(x) in (torch.Tensor, torch.nn.Parameter) and x.is_contiguous(),
        strides=lambda x: x.stride(),
        float64=lambda x: x.device.type != "mps",
        writeable=_writeable,
        present=_present,
        plain=lambda *arrays: _present(*arrays) and all([x.is_cpu for x in arrays]),  # noqa: C419 - a list is faster
        records=_records,
        overlap=_overlap,
        same=lambda x, out: x.data_ptr() == out.data_ptr() and x.stride() == out.stride(),
        number=_number,
        arithmetic=PURE._replace(multiply_add=_multiply_add),
        into=_into,
        busy=_busy,
        address=lambda x: x.data_ptr(),
        aligned=lambda x: x.data_ptr() % x.element_size() == 0,
        in_place=lambda x: not x.is_neg(),
        threaded=True,
        norm=partial(torch.linalg.vector_norm, dim=-1),
        summing=_summing,
        shared=_shared,
        host=_host,
        new=_new,
        nothing=lambda shape, dtype: torch.zeros(shape, dtype=dtype, device="cpu"),
        version=lambda x: None if x.is_inference() else x._version,
    )


def _summing(all_reduce: Callable[[Array], Any]) -> Callable[[Array], Any]:
    node = _nodes()["sum"]
    return lambda x: node.apply(x, all_reduce)


def _shared(x: Array, all_reduce: Callable[[Array], Any]) -> Any:
    return _nodes()["shared"].apply(x, all_reduce)


_made: dict[str, Any] = {}
"""Made once, and not in a cache of functools, which torch.compile looks through."""


def _nodes() -> dict[str, Any]:
    """A sum over replicas, and what they share: the derivative of the one is the same sum, of the other that sum."""
    if _made:
        return _made

    def summed(x: Array, all_reduce: Callable[[Array], Any]) -> Any:
        place = x.clone()
        whole = all_reduce(place)
        return place if whole is None else whole

    def same(x: Array, _: Callable[[Array], Any]) -> Any:
        return x.view_as(x)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        ctx.all_reduce = inputs[1]

    def of_both(ctx: Any, dy: Array) -> tuple[Any, None]:
        return total.apply(dy.reshape(-1), ctx.all_reduce).reshape(dy.shape), None

    def sum_of_tangent(ctx: Any, dx: Array, _: None) -> Any:
        return total.apply(dx, ctx.all_reduce)

    def same_tangent(_: Any, dx: Array, __: None) -> Any:
        return dx.view_as(dx)

    def summed_vmap(_: Any, dims: tuple[int, None], x: Array, all_reduce: Callable[[Array], Any]) -> Any:
        x = x.movedim(dims[0], 0)
        return total.apply(x.reshape(-1), all_reduce).reshape(x.shape), 0

    def same_vmap(_: Any, dims: tuple[int, None], x: Array, all_reduce: Callable[[Array], Any]) -> Any:
        return shared.apply(x, all_reduce), dims[0]

    def node(name: str, forward: Any, jvp: Any, vmap: Any) -> Any:
        methods = {"forward": forward, "setup_context": setup_context, "backward": of_both, "jvp": jvp, "vmap": vmap}
        base = sys.modules["torch"].autograd.Function
        return type(name, (base,), {each: staticmethod(method) for each, method in methods.items()})

    total = node("AllReduce", summed, sum_of_tangent, summed_vmap)
    shared = node("Shared", same, same_tangent, same_vmap)
    _made.update(sum=total, shared=shared)
    return _made


def _host(x: Array) -> Any:
    torch = sys.modules["torch"]
    x = x.detach().cpu().resolve_neg()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def _readable(x: Array) -> bool:
    torch = sys.modules["torch"]
    return x.is_cpu and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _writeable(out: Array) -> bool:
    if out.is_inference() and not sys.modules["torch"].is_inference_mode_enabled():
        return False
    # one that came empty from NumPy has no strides
    return out.numel() == 0 or all(step != 0 or n <= 1 for step, n in zip(out.stride(), out.shape, strict=True))


def _overlap(x: Array, out: Array) -> bool:
    (start, stop), (first, last) = map(_reach, (x, out))  # and no look at storages, as one of NumPy may have two
    return bool(start < last and first < stop)


def _reach(x: Array) -> tuple[int, int]:
    """Between which addresses the numbers of an array are."""
    start = x.data_ptr()
    if x.numel() == 0:
        return start, start
    last = sum([(n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)])
    return start, start + (last + 1) * x.element_size()


def _new(shape: tuple[int, ...], dtype: Any) -> Array:
    """Where all pages are new, small ones cost more than the norm: NumPy asks for huge pages."""
    torch = sys.modules["torch"]
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = np.empty(nbytes + HUGE, dtype=np.uint8)
    start = -memory.ctypes.data % HUGE
    return torch.from_numpy(memory[start : start + nbytes]).view(dtype).reshape(shape)


def _present(*arrays: Array) -> bool:
    torch = sys.modules["torch"]
    if torch.compiler.is_compiling() or _transforms(torch):
        return False
    recorded, batched = torch.is_grad_enabled(), torch._C._functorch.is_legacy_batchedtensor  # by is_grads_batched
    for x in arrays:
        if type(x) not in (torch.Tensor, torch.nn.Parameter) or x.is_meta or batched(x):
            return False
        if (recorded and x.requires_grad) or _dual(torch, x):
            return False
    return True


def _records(arrays: list[Array]) -> bool:
    torch = sys.modules["torch"]
    return (
        torch.is_grad_enabled()
        and any([x.requires_grad for x in arrays])  # noqa: C419 - a list is faster
        and not torch.compiler.is_compiling()
        and not _transforms(torch)
        and not any(_dual(torch, x) for x in arrays)
    )


def _dual(torch: Any, x: Array) -> bool:
    """Whether a derivative is carried along with x."""
    dual = torch.autograd.forward_ad
    if getattr(dual, "_current_level", 0) < 0:  # nothing is carried; to ask is slow
        return False
    return dual.unpack_dual(x).tangent is not None


@contextmanager
def _busy() -> Iterator[None]:
    """Nothing is recorded, and autocast makes no bfloat16 of products of matrices."""
    torch = sys.modules["torch"]
    with torch.no_grad():
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                yield
        else:
            yield


def _transforms(torch: Any) -> bool:
    return bool(torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())


def _number(value: float, dtype: Any, like: Array) -> Array | None:
    torch = sys.modules["torch"]
    if type(like) not in (torch.Tensor, torch.nn.Parameter) or not like.is_cpu:
        return None
    if torch.compiler.is_compiling() or _transforms(torch) or torch._C._len_torch_dispatch_stack():
        return None  # a mode may make what it likes of it, a fake tensor say, and here it would be kept
    with torch.inference_mode(False):  # else autograd could not save it where it is used again
        return torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype)


def _multiply_add(x: Array, factor: Array, addend: Array) -> Array:
    if _same_along_rows(x, factor, addend):
        return PURE.multiply_add(x, factor, addend)
    return sys.modules["torch"].addcmul(addend, x, factor)


def _same_along_rows(x: Array, factor: Array, addend: Array) -> bool:
    """Whether both stay the same along the rows of x, where addcmul is slow."""
    return bool(factor.shape[-1] < x.shape[-1] and factor.shape[-1] == addend.shape[-1])


def _into(place: Array) -> Ops:
    torch = sys.modules["torch"]
    add, subtract, multiply = (partial(each, out=place) for each in (torch.add, torch.sub, torch.mul))

    def multiply_add(x: Array, factor: Array, addend: Array) -> Array:
        if _same_along_rows(x, factor, addend):
            if addend.shape[0] > 1 or x.shape[0] < REPEATED or math.prod(x.shape[1:]) > WRITTEN_OUT:
                return add(multiply(x, factor), addend)
            addend = addend.expand(1, *x.shape[1:]).contiguous()
        return torch.addcmul(addend, x, factor, out=place)

    return Ops(add, subtract, multiply, multiply_add)
