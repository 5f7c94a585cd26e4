"""What PyTorch does its own way: autograd, transforms, threads, and the operations that it is fast at."""

import math
import sys
import warnings
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from operator import methodcaller
from typing import Any

import numpy as np

from anynorm.arrays.library import AllReduce, Library, Shape
from anynorm.kernels import PURE, Array, Namespace, Ops

HUGE = 2**21
"""The bytes of a huge page."""
LARGE = 2**22
"""From so many bytes on the pages of a new array cost more than the norm, unless they are huge."""


class TorchLibrary(Library, name="torch"):
    """PyTorch. torch.compile follows these methods: they keep to what it knows, lists and no generators, say."""

    eager_block = None
    threaded = True
    symbols = True
    autograd = True
    programs = "cpu"
    strides_in_bytes = False
    strides: Any = methodcaller("stride")
    address: Any = methodcaller("data_ptr")
    cast_to_float32 = "{}.to(torch.float32)"

    def __init__(self, name: str, xp: Namespace) -> None:
        super().__init__(name, xp)
        self.torch = torch = sys.modules["torch"]
        self.ops = PURE._replace(multiply_add=_multiply_add)
        if not torch.compiler.is_compiling():
            _nodes()

    def check_supported(self, name: str, x: Array) -> None:
        layout = "nested" if x.is_nested else str(x.layout)[len("torch.") :]
        if layout != "strided":
            raise TypeError(f"{name} must be a plain array, got one that is {layout}")

    def device(self, x: Array) -> Any:
        return x.device

    def device_key(self, x: Array) -> Any:
        return x.device, x.layout

    def has_float64(self, x: Array) -> bool:
        return x.device.type != "mps"  # type: ignore[no-any-return]

    def traced(self) -> bool:
        return self.torch.compiler.is_compiling() or self.torch.jit.is_tracing()  # type: ignore[no-any-return]

    def sizes(self, x: Array) -> tuple[Any, ...]:
        if self.torch.compiler.is_compiling():  # to Dynamo a symbol is an int
            shapes = self.torch.fx.experimental.symbolic_shapes
            static = shapes.has_static_value if hasattr(shapes, "has_static_value") else shapes.is_concrete_int
            return tuple([n if static(n) else math.nan for n in x.shape])
        if not self.torch.jit.is_tracing():
            return super().sizes(x)
        with warnings.catch_warnings(action="ignore"):  # of tensors that are made Python's numbers
            return tuple([int(n) for n in x.shape])

    def sizes_vary(self, sizes: tuple[Any, ...]) -> bool:
        return self.torch.jit.is_tracing() or super().sizes_vary(sizes)

    def on_host(self, x: Array) -> bool:
        return x.is_cpu and not self.torch.compiler.is_compiling() and not self.torch.jit.is_tracing()

    def concrete(self, *arrays: Array) -> bool:
        torch = self.torch
        if torch.compiler.is_compiling() or _transforms(torch):
            return False
        recorded, batched = torch.is_grad_enabled(), torch._C._functorch.is_legacy_batchedtensor  # by is_grads_batched
        for x in arrays:
            if type(x) not in (torch.Tensor, torch.nn.Parameter) or x.is_meta or batched(x):
                return False
            if (recorded and x.requires_grad) or _dual(torch, x):
                return False
        return True

    def writable_in_blocks(self, *arrays: Array) -> bool:
        return self.concrete(*arrays) and all([x.is_cpu for x in arrays])  # noqa: C419 - a list is faster

    def records(self, arrays: list[Array]) -> bool:
        torch = self.torch
        return (
            torch.is_grad_enabled()
            and any([x.requires_grad for x in arrays])  # noqa: C419 - a list is faster
            and not _transforms(torch)
            and not any(_dual(torch, x) for x in arrays)
        )

    def version(self, x: Array) -> int | None:
        return None if x.is_inference() else x._version

    def constant(self, x: Array) -> Array:
        return x.detach()

    def to_numpy(self, x: Array) -> Any:
        x = x.detach().cpu().resolve_neg()
        return (x.view(self.torch.int16) if x.dtype == self.torch.bfloat16 else x).numpy()

    def from_numpy(self, values: Any, like: Array, *, bfloat16: bool = False) -> Array:
        x = self.torch.from_numpy(values.view(np.int16) if bfloat16 else values)
        return (x.view(self.torch.bfloat16) if bfloat16 else x).to(like.device)

    def number(self, value: float, dtype: Any, like: Array) -> Array | None:
        torch = self.torch
        if type(like) not in (torch.Tensor, torch.nn.Parameter) or not like.is_cpu:
            return None
        if torch.compiler.is_compiling() or _transforms(torch) or torch._C._len_torch_dispatch_stack():
            return None  # a mode may make what it likes of it, a fake tensor say, and here it would be kept
        with torch.inference_mode(False):  # else autograd could not save it where it is used again
            return torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype)

    def contiguous(self, x: Array) -> bool:
        return type(x) in (self.torch.Tensor, self.torch.nn.Parameter) and x.is_contiguous()

    def overlap(self, x: Array, out: Array) -> bool:
        (start, stop), (first, last) = map(_reach, (x, out))  # and no look at storages, as one of NumPy may have two
        return bool(start < last and first < stop)

    def same_memory(self, x: Array, out: Array) -> bool:
        same = x.data_ptr() == out.data_ptr() and x.stride() == out.stride()
        return bool(same and x.element_size() == out.element_size())

    def writeable(self, x: Array) -> bool:
        compiling = self.torch.compiler.is_compiling()  # a graph is not told, and refuses to run
        if not compiling and x.is_inference() and not self.torch.is_inference_mode_enabled():
            return False
        # one that came empty from NumPy has no strides
        return x.numel() == 0 or all(step != 0 or n <= 1 for step, n in zip(x.stride(), x.shape, strict=True))

    def empty(self, shape: Shape, like: Array, dtype: Any) -> Array:
        if self.writable_in_blocks(like):
            return self.host_empty(shape, dtype)
        return super().empty(shape, like, dtype)

    def into(self, place: Array) -> Ops:
        torch = self.torch
        add, subtract, multiply = (partial(of, out=place) for of in (torch.add, torch.sub, torch.mul))

        def multiply_add(x: Array, factor: Array, addend: Array) -> Array:
            if _same_along_rows(x, factor, addend):
                return add(multiply(x, factor), addend)
            return torch.addcmul(addend, x, factor, out=place)

        return Ops(add, subtract, multiply, multiply_add)

    def quiet(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def block_by_block(self) -> AbstractContextManager[Any]:
        return _unrecorded(self.torch)

    def wide(self, x: Array) -> Any:
        torch = self.torch
        narrow = x.is_cpu and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        return torch.float64 if narrow and torch.compiler.is_compiling() else None

    def once(self, x: Array) -> Array:
        exporting = getattr(self.torch.compiler, "is_exporting", bool)  # since PyTorch 2.7
        # Inductor makes an array of what it cannot see through
        return x if exporting() else self.torch.as_strided(x, x.shape, x.stride())

    def summing(self, all_reduce: AllReduce) -> AllReduce:
        node = _nodes()["sum"]
        return lambda x: node.apply(x, all_reduce)

    def shared(self, x: Array, all_reduce: AllReduce) -> Array:
        return _nodes()["shared"].apply(x, all_reduce)

    def aligned(self, x: Array) -> bool:
        return x.data_ptr() % x.element_size() == 0  # type: ignore[no-any-return]

    def memory_key(self, x: Array) -> Hashable:
        return x.stride(), self.in_place(x)

    def in_place(self, x: Array) -> bool:
        return not (x.is_neg() or x._is_zerotensor())  # both are numbers that are not there

    def host_empty(self, shape: Shape, dtype: Any) -> Array:
        """Where all pages are new, small ones cost more than the norm: NumPy asks for huge pages."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < LARGE:
            return self.torch.empty(shape, dtype=dtype, device="cpu")
        memory = np.empty(nbytes + HUGE, dtype=np.uint8)
        start = -memory.ctypes.data % HUGE
        return self.torch.from_numpy(memory[start : start + nbytes]).view(dtype).reshape(shape)

    def host_zeros(self, shape: Shape, dtype: Any) -> Array:
        return self.torch.zeros(shape, dtype=dtype, device="cpu")


def _transforms(torch: Any) -> bool:
    return bool(torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())


def _dual(torch: Any, x: Array) -> bool:
    """Whether a derivative is carried along with x."""
    dual = torch.autograd.forward_ad
    if getattr(dual, "_current_level", 0) < 0:  # nothing is carried; to ask is slow
        return False
    return dual.unpack_dual(x).tangent is not None


def _reach(x: Array) -> tuple[int, int]:
    """Between which addresses the numbers of an array are."""
    start = x.data_ptr()
    if x.numel() == 0:
        return start, start
    last = sum([(n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)])
    return start, start + (last + 1) * x.element_size()


def _multiply_add(x: Array, factor: Array, addend: Array) -> Array:
    if _same_along_rows(x, factor, addend):
        return PURE.multiply_add(x, factor, addend)
    return sys.modules["torch"].addcmul(addend, x, factor)


def _same_along_rows(x: Array, factor: Array, addend: Array) -> bool:
    """Whether both stay the same along the rows of x, where addcmul is slow."""
    return bool(factor.shape[-1] < x.shape[-1] and factor.shape[-1] == addend.shape[-1])


@contextmanager
def _unrecorded(torch: Any) -> Iterator[None]:
    """Nothing is recorded, and autocast makes no bfloat16 of products of matrices."""
    with torch.no_grad():
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                yield
        else:
            yield


_made: dict[str, Any] = {}
"""Made once, and not in a cache of functools, which torch.compile looks through."""


def _nodes() -> dict[str, Any]:
    """A sum over replicas, and what they share: the derivative of the one is the same sum, of the other that sum."""
    if _made:
        return _made

    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        ctx.all_reduce = inputs[1]

    def backward(ctx: Any, dy: Array) -> tuple[Any, None]:
        return total.apply(dy.reshape(-1), ctx.all_reduce).reshape(dy.shape), None

    def node(name: str, **methods: Any) -> Any:
        methods |= {"setup_context": setup_context, "backward": backward}
        base = sys.modules["torch"].autograd.Function
        return type(name, (base,), {key: staticmethod(method) for key, method in methods.items()})

    def summed(x: Array, all_reduce: AllReduce) -> Any:
        place = x.clone()
        result = all_reduce(place)
        return place if result is None else result

    def summed_vmap(_: Any, dims: tuple[int, None], x: Array, all_reduce: AllReduce) -> Any:
        x = x.movedim(dims[0], 0)
        return total.apply(x.reshape(-1), all_reduce).reshape(x.shape), 0

    def shared_vmap(_: Any, dims: tuple[int, None], x: Array, all_reduce: AllReduce) -> Any:
        return shared.apply(x, all_reduce), dims[0]

    total: Any = node(
        "AllReduce", forward=summed, vmap=summed_vmap, jvp=lambda ctx, dx, _: total.apply(dx, ctx.all_reduce)
    )
    shared: Any = node(
        "Shared", forward=lambda x, _: x.view_as(x), vmap=shared_vmap, jvp=lambda ctx, dx, _: dx.view_as(dx)
    )
    _made.update(sum=total, shared=shared)
    return _made
