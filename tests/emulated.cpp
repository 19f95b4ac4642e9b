// The kernels of fastres/native/cuda on a CPU; the arguments of `emulate` are those of cuLaunchKernel.
#include "layers.cu"

template <auto kernel>
static void launch(int which, int programs, int layers, void** params, bool backwards) {
  emulated::body = emulated::enter<kernel>;
  emulated::params = params;
  emulated::programs_x = programs;
  int sizes[64];
  report_sizes(sizes);
  for (int y = 0; y < layers; y++)
    for (int x = 0; x < programs; x++) {
      emulated::program_x = x;
      emulated::program_y = y;
      emulated::run(sizes[2 * which], sizes[2 * which + 1], backwards);
    }
}

extern "C" void emulate(int which, int programs, int layers, void** params, bool backwards) {
  using Launch = void (*)(int, int, int, void**, bool);
  const Launch launches[] = {launch<forward_layer>, launch<backward_layer>, launch<weight_grads>, launch<norm_forward>,
                             launch<norm_backward>, launch<head>,           launch<sum_weight_shares>,
                             launch<head_grads>};
  emulated::turns[0] = emulated::turns[1] = 0;
  launches[which](which, programs, layers, params, backwards);
}

extern "C" int turns(int which) { return emulated::turns[which]; }

extern "C" void tell(int* to) { report_sizes(to); }
