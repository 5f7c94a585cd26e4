"""An array library of the tests' own: what the array API standard of 2022.12 has, on top of NumPy, and nothing beyond.

No `reciprocal`, `maximum`, `minimum` or `__array_namespace_info__`, which came later; arrays that cannot be written to,
that NumPy does not take for its own, and that meet nothing but each other and Python's numbers. Their sizes may be
None, as the standard allows, in what `hidden` makes of an array.
"""

import builtins
import operator
import sys

import numpy as np

STANDARD = {
    "elementwise": """abs acos acosh add asin asinh atan atan2 atanh bitwise_and bitwise_invert bitwise_left_shift
        bitwise_or bitwise_right_shift bitwise_xor ceil conj cos cosh divide equal exp expm1 floor floor_divide greater
        greater_equal imag isfinite isinf isnan less less_equal log log10 log1p log2 logaddexp logical_and logical_not
        logical_or logical_xor multiply negative not_equal positive pow real remainder round sign sin sinh sqrt square
        subtract tan tanh trunc where""",
    "others": """all any argmax argmin argsort broadcast_arrays broadcast_to can_cast concat empty_like expand_dims flip
        full_like matmul matrix_transpose max mean min nonzero ones_like permute_dims prod result_type roll sort squeeze
        stack std sum take tensordot tril triu unique_all unique_counts unique_inverse unique_values var vecdot
        zeros_like""",
    "of a device": "arange empty eye full linspace ones zeros",
    "as they are": """bool complex64 complex128 e finfo float32 float64 iinfo inf int8 int16 int32 int64 isdtype nan
        newaxis pi uint8 uint16 uint32 uint64""",
}
DEVICE = "the one there is"


class Array:
    """An array of the standard."""

    __array_ufunc__ = None

    def __init__(self, values, unknown=()):
        self._values, self._unknown = values, unknown

    def __array_namespace__(self, /, *, api_version=None):
        assert api_version in (None, "2021.12", "2022.12")
        return sys.modules[__name__]

    dtype = property(lambda self: self._values.dtype)
    ndim = property(lambda self: self._values.ndim)
    shape = property(
        lambda self: tuple(None if axis in self._unknown else n for axis, n in enumerate(self._values.shape))
    )
    size = property(lambda self: None if self._unknown else self._values.size)
    device = property(lambda self: DEVICE)
    T = property(lambda self: _array(self._values.T))

    def to_device(self, device, /, *, stream=None):
        assert (device, stream) == (DEVICE, None)
        return self

    def to_numpy(self):
        return self._values

    def __dlpack__(self, *, stream=None):
        return self._values.__dlpack__()

    def __dlpack_device__(self):
        return self._values.__dlpack_device__()

    def __getitem__(self, key):
        return _array(self._values[key])

    __hash__ = None


def hidden(x, *axes):
    """The same array, with sizes that are not told."""
    return Array(x._values, axes)


def asarray(obj, /, *, dtype=None, device=None, copy=None):
    assert device in (None, DEVICE)
    if isinstance(obj, Array):
        values = obj._values
    else:
        values = obj if isinstance(obj, (builtins.bool, int, float, list, tuple)) else np.asarray(memoryview(obj))
    return _array(np.array(values, dtype=dtype, copy=copy))


def astype(x, dtype, /, *, copy=True):
    return _array(x._values.astype(dtype, copy=copy))


def reshape(x, /, shape, *, copy=None):
    return _array(np.reshape(x._values, tuple(map(operator.index, shape))))


def from_dlpack(x, /):
    return _array(np.from_dlpack(x))


def _array(values):
    return Array(np.asarray(values))


def _given(value):
    """What NumPy is given for an argument: arrays of this library, in lists too, and what is no array of another."""
    if isinstance(value, Array):
        return value._values
    assert not isinstance(value, (np.ndarray, np.generic)), "an array of another library"
    return type(value)(map(_given, value)) if type(value) in (list, tuple) else value


def _found(value):
    if isinstance(value, (np.ndarray, np.generic)):
        return _array(value)
    return [_found(each) for each in value] if type(value) in (list, tuple) else value


def _function(name, kind):
    function = getattr(np, name)

    def work(*given, device=None, **options):
        assert device in ((None, DEVICE) if kind == "of a device" else (None,))
        assert kind != "elementwise" or builtins.all(isinstance(each, Array) for each in given), "numbers came later"
        return _found(function(*map(_given, given), **{key: _given(each) for key, each in options.items()}))

    work.__name__ = name
    return work


def _operator(name):
    function = getattr(np.ndarray, name)

    def work(self, *others):
        if builtins.any(not isinstance(other, (Array, builtins.bool, int, float, complex)) for other in others):
            return NotImplemented
        return _found(function(self._values, *map(_given, others)))

    return work


for _kind, _names in STANDARD.items():
    for _name in _names.split():
        globals()[_name] = getattr(np, _name) if _kind == "as they are" else _function(_name, _kind)
_BINARY = "add and floordiv lshift matmul mod mul or pow rshift sub truediv xor"
_OTHERS = "abs bool complex eq float ge gt index int invert le lt ne neg pos"
for _name in [*_BINARY.split(), *(f"r{name}" for name in _BINARY.split()), *_OTHERS.split()]:
    setattr(Array, f"__{_name}__", _operator(f"__{_name}__"))
