// What the programs of a GPU are written in. LANES threads have a group, TOGETHER groups are in a block; COLUMNS says how
// many groups are side by side in memory, or 0; a thread has PACK numbers side by side. Index is an integer.

struct Half { unsigned short bits; };
struct Bfloat { unsigned short bits; };

// in words of the machine, as CuPy has its compiler take subnormal numbers of float32 for 0
#define SAY(word, a, b) float y; asm(word " %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b)); return y
__device__ float plus(float a, float b) { SAY("add.rn.f32", a, b); }
__device__ float minus(float a, float b) { SAY("sub.rn.f32", a, b); }
__device__ float times(float a, float b) { SAY("mul.rn.f32", a, b); }
__device__ double widened(float x) { double y; asm("cvt.f64.f32 %0, %1;" : "=d"(y) : "f"(x)); return y; }
__device__ float narrowed(double x) { float y; asm("cvt.rn.f32.f64 %0, %1;" : "=f"(y) : "d"(x)); return y; }
__device__ float read(const Half &x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
__device__ void write(Half &y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ float read(const Bfloat &x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ void write(Bfloat &y, float x) {
  const unsigned bits = __float_as_uint(x);
  y.bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <class T> struct alignas(sizeof(T) * PACK < 16 ? sizeof(T) * PACK : 16) Pack { T a[PACK]; };

__device__ double plus(double a, double b) { return a + b; }
__device__ double minus(double a, double b) { return a - b; }
__device__ double times(double a, double b) { return a * b; }
__device__ float read(const float &x) { return x; }
__device__ double read(const double &x) { return x; }
__device__ void write(float &y, float x) { y = x; }
__device__ void write(double &y, double x) { y = x; }

template <int HOW, class T> __device__ T join(T a, T b) {
  return HOW == 0 ? a + b : HOW == 1 ? (b < a ? b : a) : (b > a ? b : a);
}

// what the threads of a group have, together
template <int HOW, class T> __device__ T across(T a) {
#if LANES > 1
#if COLUMNS
  __shared__ T kept[LANES * COLUMNS];
  __syncthreads();
  kept[threadIdx.x] = a;
  __syncthreads();
  a = kept[threadIdx.x % COLUMNS];
  for (int i = 1; i < LANES; i++) a = join<HOW>(a, kept[threadIdx.x % COLUMNS + i * COLUMNS]);
#else
  for (int step = (LANES < 32 ? LANES : 32) / 2; step; step /= 2) a = join<HOW>(a, __shfl_xor_sync(~0u, a, step));
#if LANES > 32
  __shared__ T kept[LANES / 32];
  __syncthreads();
  if (threadIdx.x % 32 == 0) kept[threadIdx.x / 32] = a;
  __syncthreads();
  a = kept[0];
  for (int i = 1; i < LANES / 32; i++) a = join<HOW>(a, kept[i]);
#endif
#endif
#endif
  return a;
}

// Which part of its group a thread has: its numbers, or packs of them, are start + lane, start + lane + LANES, ...
struct Place { Index group, lane, start, stop; bool live; };
__device__ Place place(Index groups, Index count) {
#if COLUMNS
  const Index slot = blockIdx.x * TOGETHER + threadIdx.x % COLUMNS, lane = threadIdx.x / COLUMNS;
#else
  const Index slot = blockIdx.x * TOGETHER + threadIdx.x / LANES, lane = threadIdx.x % LANES;
#endif
  const bool live = slot < groups;
  const Index share = (count + gridDim.y - 1) / gridDim.y, start = share * blockIdx.y;
  return {live ? slot : groups - 1, lane, start, start + share < count ? start + share : count, live};
}
