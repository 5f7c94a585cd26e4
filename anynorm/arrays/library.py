"""What the package asks of an array library, and how a library is added.

An array whose `__array_namespace__` is the array API is computed as it is: by `Library` itself, which takes it for one
that may be traced, lazy or on a GPU, so that no number is read out of it and no result is written part by part.
A library that does something its own way is a subclass, in a module that `anynorm.arrays` imports, by the name that its
namespace begins with::

    class NdonnxLibrary(Library, name="ndonnx"):
        def on_host(self, x):
            return self.concrete(x)  # its numbers are there to be looked at

Where arrays have no `__array_namespace__`, two lines in `recognize` find their namespace, as PyTorch's. A library whose
arrays all lie in the processor's memory says `in_memory = True`, and large arrays are computed block by block.
"""

import importlib
import math
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, Literal

import array_api_compat
import numpy as np

from anynorm.arrays.standard import completed
from anynorm.kernels import PURE, Array, Namespace, Ops

BLOCK = 256
"""The longest run that a library is trusted to add in one go, if it is not known to do better."""
PIECE = 2**16
"""So many numbers are looked at in one go."""

Shape = tuple[int, ...]
AllReduce = Callable[[Array], Any]


class Library:
    """An array library: its namespace, and what libraries do in different ways, here as it is right for any of them.

    There is one object for each library, which is pickled by name.
    """

    in_memory = False
    """Whether all its arrays are there, in the memory of the processor, to be read and written to at any time."""
    block: int | None = BLOCK
    """The longest run of numbers that the library is trusted to add in one go; None where it blocks its own sums."""
    eager_block: int | None = BLOCK
    """The same of arrays that are `writable_in_blocks`: what a compiler would make of a sum is no matter there."""
    blas_sums = False
    """Whether it adds fastest by multiplying with ones."""
    threaded = False
    """Whether several of its own threads share an operation on an array that is not on a GPU."""
    chunked = False
    """Whether its arrays are lazy and in chunks, which are arrays of another library."""
    one_device = False
    """Whether type, dtype and shape are all in which its arrays may differ: `device_key` is None."""
    autograd = False
    """Whether there is an autograd that `records`."""
    symbols = False
    """Whether a size that is not known is a symbol, which stands for any size but 0."""
    compiles = False
    """Whether `compiled` makes one function of many operations."""
    takes_numpy = False
    """Whether NumPy's arrays beside its own are taken for its own, as its functions take them."""
    branches = False
    """Whether it computes one of two ways by a number that cannot be read yet: it has a `branch`."""
    programs: Literal["", "cpu", "cuda"] = ""
    """Where programs made of the kernels run on its arrays: by `address` and `host_empty`, or by `launch`."""
    strides_in_bytes = True
    """Whether its strides count bytes, and not numbers."""
    offset = 0
    """How many bytes after the `address` of an array that of its numbers is written."""
    cast_to_float32 = "xp.astype({}, xp.float32)"
    """How one writes that."""
    ops: Ops = PURE
    """Arithmetic whose results are new."""

    _classes: ClassVar[dict[str, type["Library"]]] = {}
    _made: ClassVar[dict[str, "Library"]] = {}

    def __init_subclass__(cls, *, name: str = "") -> None:
        if name:
            Library._classes[name] = cls

    def __init__(self, name: str, xp: Namespace) -> None:
        self.name, self.xp = name, xp

    @staticmethod
    def of_namespace(xp: Namespace) -> "Library":
        """The library of a namespace."""
        name = xp.__name__.removeprefix("array_api_compat.").partition(".")[0]
        if name not in Library._made:
            Library._made.setdefault(name, Library._classes.get(name, Library)(name, xp))
        return Library._made[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_name, (self.xp.__name__,)

    # what an array is

    def check_supported(self, name: str, x: Array) -> None:
        """A TypeError if the argument `name` is of a kind that is not computed with."""

    def device(self, x: Array) -> Any:
        """The device, or None where there is but one or the library itself is the better judge."""
        return getattr(x, "device", None)

    def device_for_new(self, like: Array) -> Any:
        """The device on which an array beside `like` is made; None leaves it to the library."""
        return self.device(like)

    def device_key(self, x: Array) -> Any:
        """All in which an array may differ from others of its type, dtype and shape."""
        return self.device(x)

    def has_float64(self, x: Array) -> bool:
        """Whether there may be arrays of float64 beside an array."""
        try:
            info = self.xp.__array_namespace_info__()
            return "float64" in info.dtypes(device=self.device(x), kind="real floating")
        except Exception:  # a library before that part of the standard
            return hasattr(self.xp, "float64")

    def traced(self) -> bool:
        """Whether a compiler follows what happens now, to whom a shape may be more than numbers."""
        return False

    def sizes(self, x: Array) -> tuple[Any, ...]:
        """The shape, with NaN for a size that is not known: None, or a symbol."""
        return tuple([int(n) if isinstance(n, (int, np.integer)) else math.nan for n in x.shape])

    def sizes_vary(self, sizes: tuple[Any, ...]) -> bool:
        """Whether what is traced of an array of these `sizes` is to be right at others."""
        return any([n != n for n in sizes])  # noqa: C419 - Dynamo takes no generator

    def reshape(self, x: Array, shape: tuple[Any, ...]) -> Array:
        """The array in a shape whose sizes may be symbols, or None: these come as they do in the shape of x."""
        return self.xp.reshape(x, tuple([-1 if n is None else n for n in shape]))

    def scales(self, x: Array) -> bool:
        """Whether a power of two is taken out of arrays whose numbers cannot be looked at."""
        return True

    def on_host(self, x: Array) -> bool:
        """Whether a number can be read out of the array now, at no cost: it is not traced, lazy or on a GPU."""
        return self.in_memory

    def concrete(self, *arrays: Array) -> bool:
        """Whether the numbers of these arrays are there, not traced or lazy, and nothing records what they become."""
        return True

    def writable_in_blocks(self, *arrays: Array) -> bool:
        """Whether a result of these arrays may be written part by part: they are concrete, and on the host."""
        return self.in_memory

    def records(self, arrays: list[Array]) -> bool:
        """Whether autograd, and nothing else, records what becomes of these arrays."""
        return False

    def version(self, x: Array) -> int | None:
        """How often the array has been written to, where the library counts that."""
        return None

    # its numbers

    def constant(self, x: Array) -> Array:
        """The array as a constant, to which no gradient flows."""
        return x

    def max(self, x: Array) -> float:
        """The largest number of an array that is on the host."""
        return float(self.xp.max(self.constant(x)))

    def min(self, x: Array) -> float:
        """The smallest."""
        return float(self.xp.min(self.constant(x)))

    def extent(self, x: Array) -> tuple[float, float]:
        """The smallest magnitude but for 0, and the largest, of an array on the host; it takes little memory."""
        least, most = np.inf, 0.0
        for part in np.nditer(self.to_numpy(x), ("external_loop", "buffered"), buffersize=PIECE):
            sizes = np.abs(part)
            most = np.maximum(most, sizes.max())  # NaN, if there is one
            least = np.min(sizes, where=sizes > 0, initial=least)
        return float(min(least, most)), float(most)

    def any_negative(self, x: Array) -> bool:
        """Whether a number in it is less than 0, where that can be read."""
        return self.on_host(x) and bool(self.xp.any(x < 0))

    def to_numpy(self, x: Array) -> Any:
        """The array in NumPy, where bfloat16 may be any dtype of two bytes."""
        return np.asarray(x) if hasattr(x, "__array__") else np.from_dlpack(x)

    def from_numpy(self, values: Any, like: Array, *, bfloat16: bool = False) -> Array:
        """A NumPy array beside `like`; bfloat16 comes as bits, in uint16. Integers may become float64."""
        device, values = self.device_for_new(like), values.view(_bfloat16()) if bfloat16 else values
        made = self.xp.asarray(values, device=device)
        if values.dtype.kind in "iu" and np.any(values > self.xp.iinfo(made.dtype).max):  # JAX made int32 of int64
            return self.xp.asarray(values.astype(np.float64), device=device)
        return made

    def subnormal(self, x: Array, power: float) -> Array | None:
        """The subnormal numbers of an array times a power of two, and 0 elsewhere, if the library flushes them to 0."""
        return None

    def number(self, value: float, dtype: Any, like: Array) -> Array | None:
        """A number as an array without axes, to be kept, where `writable_in_blocks` arrays are faster with that."""
        return None

    # its memory

    def contiguous(self, x: Array) -> bool:
        """Whether neighbouring axes of the array are one in memory too."""
        return False

    def strides(self, x: Array) -> Shape:
        """How far apart in memory neighbours along each axis lie; 0 where it is not known."""
        return (0,) * len(x.shape)

    def memory_key(self, x: Array) -> Hashable:
        """All in which arrays of one dtype and shape may lie differently in memory."""
        return self.strides(x)

    def memory_order(self, x: Array) -> Shape | None:
        """The axes as they follow each other in memory, () for their own order; None if they do not."""
        if self.contiguous(x):
            return ()
        steps = self.strides(x)
        axes = tuple(range(len(steps)))
        order = tuple(sorted(axes, key=lambda axis: -steps[axis]))
        return order if order != axes and self.contiguous(self.xp.permute_dims(x, order)) else None

    def in_rows(self, x: Array) -> bool:
        """Whether no numbers are nearer in memory than neighbours along the last axis."""
        steps = [abs(step) for step, n in zip(self.strides(x), x.shape, strict=True) if step and n != 1]
        return not steps or steps[-1] == min(steps)

    def overlap(self, x: Array, out: Array) -> bool:
        """Whether two arrays may have memory in common."""
        return True

    def same_memory(self, x: Array, out: Array) -> bool:
        """Whether two arrays of one shape are one in memory."""
        return False

    def writeable(self, x: Array) -> bool:
        """Whether the array may be written to."""
        return hasattr(x, "__setitem__") and bool(array_api_compat.is_writeable_array(x))

    def wide(self, x: Array) -> Any:
        """A dtype in which the square of each number of an array exists, where the library adds in that at no cost."""
        return None

    def once(self, x: Array) -> Array:
        """The array, where a compiler would compute it again for each number that it goes with."""
        return x

    def adds(self, x: Array, dtype: Any) -> bool:
        """Whether the array can be added up along its rows as it is, in this dtype."""
        return bool(x.dtype == dtype)

    def cast(self, x: Array, dtype: Any) -> Array:
        """The array, or a copy, that `adds` in this dtype."""
        return x if self.adds(x, dtype) else self.xp.astype(x, dtype)

    def assign(self, place: Array, values: Array) -> None:
        """Write values to a place, in its dtype."""
        place[...] = values

    def empty(self, shape: Shape, like: Array, dtype: Any) -> Array:
        """An array to be written to, beside `like`."""
        return self.xp.empty(shape, dtype=dtype, device=self.device_for_new(like))

    def zeros(self, shape: int | Shape, like: Array, dtype: Any) -> Array:
        """Zeros, beside `like`."""
        return self.xp.zeros(shape, dtype=dtype, device=self.device_for_new(like))

    # its operations

    def into(self, place: Array) -> Ops:
        """Arithmetic whose results are all written to one place."""
        return PURE

    def quiet(self) -> AbstractContextManager[Any]:
        """Silences the library's warnings of overflow and invalid values, which the results show."""
        return np.errstate(all="ignore")

    def block_by_block(self) -> AbstractContextManager[Any]:
        """As `quiet`, where block after block is worked on."""
        return self.quiet()

    def quietly(self, function: Callable[..., tuple[Array, ...]], *arrays: Array) -> tuple[Array, ...]:
        """`function(xp, *arrays)`, element by element, without warnings: also where it is computed later."""
        with self.quiet():
            return function(self.xp, *arrays)

    def astype(self, x: Array, dtype: Any) -> Array:
        """The array in another dtype, without warnings."""
        return x if x.dtype == dtype else self.quietly(partial(_astype, dtype), x)[0]

    def compiled(self, key: Hashable, function: Callable[..., Any], *arrays: Any) -> Any:
        """`function(*arrays)`; compiled as one where the library `compiles`, by a key that tells it from others."""
        return function(*arrays)

    def branch(self, which: Array, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
        """What `one` returns where this is True, else the `other`."""
        raise NotImplementedError

    def differentiated(
        self, key: Hashable, function: Callable[[Array], Any], derivative: Callable[[Any, Array], Any], x: Array
    ) -> Any:
        """`function(x)`; where the library differentiates by itself, by `derivative(function(x), dx)`, linear in dx."""
        return function(x)

    def summing(self, all_reduce: AllReduce) -> AllReduce:
        """The function that sums over replicas, with its derivative: the same of the cotangents."""
        return all_reduce

    def shared(self, x: Array, all_reduce: AllReduce) -> Array:
        """The array as one that all replicas have, to which the cotangents of all of them flow."""
        return x

    # programs, in its memory or on its GPU

    def aligned(self, x: Array) -> bool:
        """Whether the numbers begin where programs read them: at a multiple of their size, on a GPU of 16 bytes."""
        return False

    def in_place(self, x: Array) -> bool:
        """Whether programs can read the numbers as they are stored: in the processor's byte order, say."""
        return False

    def address(self, x: Array) -> int:
        """Where the numbers of an array begin in the memory of the processor; or see `offset`."""
        raise NotImplementedError

    def host_empty(self, shape: Shape, dtype: Any) -> Array:
        """New memory of the processor."""
        return self.xp.empty(shape, dtype=dtype)

    def host_zeros(self, shape: Shape, dtype: Any) -> Array:
        """The same, of zeros."""
        return self.xp.zeros(shape, dtype=dtype)

    def launch(self, text: str, grid: Any, threads: int, arrays: list[Array], sizes: Any, large: bool) -> None:
        """Run the text of a program over a grid of blocks of threads.

        It takes the arrays, the number and the length of the groups, large or not, and what a sum is divided by.
        """
        raise NotImplementedError

    def on_device(self, x: Array) -> AbstractContextManager[Any]:
        """Where programs run on the device of an array, and memory is that device's."""
        return nullcontext()


def _of_name(namespace: str) -> Library:
    return Library.of_namespace(completed("x", importlib.import_module(namespace)))


def _astype(dtype: Any, xp: Namespace, x: Array) -> tuple[Array]:
    return (xp.astype(x, dtype),)


def _bfloat16() -> Any:
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError("arrays of bfloat16 outside PyTorch need ml_dtypes: pip install ml_dtypes") from error
    return bfloat16
