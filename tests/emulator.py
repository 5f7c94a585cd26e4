"""A GPU for the programs of anynorm, on the processor: each block in turn, with a thread for each group."""

import ctypes
import hashlib
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from inner import cuda

HEAD = """
extern "C" void *memcpy(void *, const void *, unsigned long);
static inline float sqrt(float x) { return __builtin_sqrtf(x); }
static inline double sqrt(double x) { return __builtin_sqrt(x); }
#define __device__ static inline
#define __global__
struct Index3 { int x, y; };
static Index3 blockIdx, gridDim, threadIdx;
static inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
"""
TAIL = """
extern "C" void run(int blocks, int splits, int threads, void **a, long long groups, long long count, double divisor) {
  gridDim.y = splits;
  for (blockIdx.y = 0; blockIdx.y < splits; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
      for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
        normalized(ARGUMENTS, groups, count, divisor);
}
"""
PORTABLE = """
__device__ float plus(float a, float b) { return a + b; }
__device__ float minus(float a, float b) { return a - b; }
__device__ float times(float a, float b) { return a * b; }
__device__ double widened(float x) { return x; }
__device__ float narrowed(double x) { return x; }
__device__ float read(const Half &x) { _Float16 y; memcpy(&y, &x.bits, 2); return y; }
__device__ void write(Half &y, float x) { _Float16 z = x; memcpy(&y.bits, &z, 2); }
"""
"""What is written in words of the machine."""


def launch(text, grid, threads, arrays, sizes, large):
    """As `Library.launch`."""
    # one lane for each group: what threads say to each other is for a GPU alone
    together = int(re.search(r"#define TOGETHER (\d+)", text)[1])
    function = _compiled(re.sub(r"#define LANES \d+", "#define LANES 1", text))
    pointers = (ctypes.c_void_p * len(arrays))(*[each.ctypes.data for each in arrays])
    function(*grid, together, pointers, *sizes[:2], ctypes.c_double(sizes[2]))


@cache
def _compiled(text):
    signature = re.search(r"void normalized\((.*), Index groups", text)[1]
    kinds = [re.sub(r"(.*\*).*", r"\1", each) for each in signature.split(", ")]
    arguments = ", ".join(f"({kind})a[{i}]" for i, kind in enumerate(kinds))
    portable = re.sub(r"#define SAY.*|.*(SAY|asm)\(.*", "", cuda.preamble())
    at = portable.index("__device__")
    portable = portable[:at] + PORTABLE + portable[at:]
    assert cuda.preamble() in text
    source = HEAD + text.replace(cuda.preamble(), portable) + TAIL.replace("ARGUMENTS", arguments)
    path = Path(_folder().name) / f"{hashlib.sha256(source.encode()).hexdigest()[:24]}.so"
    # no header and no library, which take most of the time
    command = ["g++", "-O0", "-std=c++17", "-shared", "-fPIC", "-nostdlib", "-w", "-x", "c++", "-", "-lgcc"]
    command += ["-o", str(path)]
    made = subprocess.run(command, input=source, text=True, capture_output=True)
    assert made.returncode == 0, made.stderr + source
    function = ctypes.CDLL(path).run
    function.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] + [ctypes.c_longlong] * 2 + [ctypes.c_double]
    function.restype = None
    return function


@cache
def _folder():
    return tempfile.TemporaryDirectory()
