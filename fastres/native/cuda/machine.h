// What a GPU has, as the kernels name it. On a CPU, for tests, `emulated.h` has the same.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#ifdef __CUDACC_RTC__
#define DEVICE __device__ __forceinline__
// A program is a thread block. Of those of up to 256 threads two fit a multiprocessor (at 64 channels on an H100 or
// H200): the next launch's, or another network's beside it.
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, (threads) > 256 ? 1 : 2)
struct alignas(16) Octet { u32 pair[4]; };  // 8 channels of a pixel

DEVICE int thread() { return threadIdx.x; }
DEVICE int program() { return blockIdx.x; }
DEVICE int which_layer() { return blockIdx.y; }
DEVICE int num_programs() { return gridDim.x; }
DEVICE u8* shared_memory() {
  extern __shared__ __align__(128) u8 memory[];
  return memory;
}
DEVICE u32 shared_address(const void* there) { return static_cast<u32>(__cvta_generic_to_shared(there)); }
// Where a launch is early (`gpu_layers.EARLY`), its programs begin as soon as those of the launch before it leave room,
// and have nothing of what that one makes before this.
DEVICE void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE float shuffle(float value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE float exponential(float value) { return expf(value); }
DEVICE float logarithm(float value) { return logf(value); }
DEVICE float root(float value) { return __fsqrt_rn(value); }
// ReLU that lets NaN through, as torch's does: else a run that diverges would not be seen to.
DEVICE float relu(float value) {
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(value));
  return value;
}
DEVICE u32 pack(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
DEVICE void cp_async_16(Octet* shared, const Octet* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Four 8 x 8 matrices, whose 8 rows of 16 bytes lanes 0 to 7, 8 to 15 and so on point to.
DEVICE void ldmatrix_x4(u32 (&to)[4], const Octet* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_x4_trans(u32 (&to)[4], const Octet* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void mma_m16n8k16(float (&acc)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#else
#include "emulated.h"  // the same on a CPU, for tests
#endif

DEVICE float low(u32 pair) { return as_float(pair << 16); }
DEVICE float high(u32 pair) { return as_float(pair & 0xffff0000u); }
DEVICE float channel(const Octet& octet, int c) { return c % 2 ? high(octet.pair[c / 2]) : low(octet.pair[c / 2]); }
DEVICE Octet packed(const float (&value)[8]) {
  Octet octet;
#pragma unroll
  for (int c = 0; c < 4; c++) octet.pair[c] = pack(value[2 * c], value[2 * c + 1]);
  return octet;
}

DEVICE constexpr int at_least(int a, int b) { return a > b ? a : b; }
