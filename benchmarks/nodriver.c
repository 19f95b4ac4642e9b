/* Answers of a GPU machine for one that has none, for `kernels.py`: the few entry points of the CUDA runtime and driver
   that torch asks while it traces with fake tensors. One H200 (compute capability 9.0, 132 SMs). Nothing is ever run. */
#include <string.h>

typedef int status; /* 0: success */

status cuInit(unsigned flags) { return 0; }
status cuDriverGetVersion(int *version) { *version = 13020; return 0; }
status cuDeviceGetCount(int *count) { *count = 1; return 0; }
status cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
status cuCtxGetCurrent(void **context) { *context = (void *)16; return 0; }
status cuCtxSetCurrent(void *context) { return 0; }
status cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return 0;
}
status cuGetErrorString(int error, const char **text) { *text = "no driver"; return 0; }

status cudaGetDevice(int *device) { if (device) *device = 0; return 0; }
status cudaSetDevice(int device) { return 0; }
status cudaInitDevice(int device, unsigned flags, unsigned more) { return 0; }
status cudaGetDeviceCount(int *count) { if (count) *count = 1; return 0; }
status cudaGetDeviceProperties(void *properties, int device) { memset(properties, 0, 700); return 0; }
status cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 10: *value = 32; break;  /* warp size */
    case 16: *value = 132; break; /* multiprocessors */
    case 75: *value = 9; break;   /* compute capability, major */
    default: *value = 0;
  }
  return 0;
}
status cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return 0;
}
status cudaDeviceCanAccessPeer(int *can, int device, int peer) { if (can) *can = 0; return 0; }
status cudaDeviceSynchronize(void) { return 0; }
status cudaStreamSynchronize(void *stream) { return 0; }
status cudaStreamQuery(void *stream) { return 0; }
status cudaStreamIsCapturing(void *stream, int *capturing) { if (capturing) *capturing = 0; return 0; }
status cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
status cudaGetLastError(void) { return 0; }
status cudaPeekAtLastError(void) { return 0; }
status cudaDriverGetVersion(int *version) { if (version) *version = 13020; return 0; }
status cudaRuntimeGetVersion(int *version) { if (version) *version = 13020; return 0; }
status cudaGetDriverEntryPoint(const char *symbol, void **function, unsigned long long flags, int *found) {
  if (function) *function = 0;
  if (found) *found = 1;
  return 0;
}
status cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags,
                                        int *found) {
  return cudaGetDriverEntryPoint(symbol, function, flags, found);
}
status cudaMemGetInfo(unsigned long *available, unsigned long *total) {
  if (available) *available = 1ul << 37;
  if (total) *total = 1ul << 37;
  return 0;
}
status cudaMalloc(void **pointer, unsigned long size) {
  static unsigned long next = 0x700000000000ul; /* addresses that nothing may touch */
  *pointer = (void *)next;
  next += (size + 511) & ~511ul;
  return 0;
}
status cudaFree(void *pointer) { return 0; }
