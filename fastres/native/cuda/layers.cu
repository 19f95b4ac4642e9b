// Layers of a CIFAR network in training on a GPU, compiled for one kind of layer by -D:
//
//   SIDE    of the target's maps, pixels: 32, 16, 8
//   STRIDE  1 or 2: the source's maps are SIDE * STRIDE
//   K, N    channels of source and target: 16, 32, 64
//   FIRST   1 for the first layer, whose source are the images: 3 channels, K = 16
//   LAYERS, CLASSES   at most, of a launch of `weight_grads` and of `head`
//   SUM_THREADS       of a program of `sum_weight_shares`
//
// A program (block of threads) takes whole images, one after the other, so nothing is read twice and no border is
// exchanged. Maps and weights are bfloat16, channels last; sums and all between are float32.
//
// `forward_layer` begins with the norm of the layer below, which needs its statistics over the batch, and ends with
// shares of the statistics of its own maps: one launch a layer. `backward_layer` is its mirror, and `head` turns from
// one to the other. A program's share is one row of two numbers a channel; the next launch's programs each sum all rows
// by themselves, in one order: the same bits every time. Gradients of weights wait for no one, so `weight_grads` makes
// those of many layers in one launch.
//
// Products are mma.m16n8k16. A warp has 64 pixels and 16 channels of the result: 4 tiles of 16 pixels, each two runs of
// 8 neighbours in a row, by 2 tiles of 8 channels. In shared memory maps lie in planes of 8 channels (an Octet, 16
// bytes): 8 neighbours are 128 bytes, which all banks give at once, whatever the window's place.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16816-float

#include "backward.h"
#include "forward.h"
#include "head.h"
#include "weights.h"

// Threads and bytes of shared memory, in the order of `gpu_layers.NAMES`. Told by a kernel, since NVRTC makes a
// variable's symbol local, which a driver may not find.
KERNEL(1) report_sizes(int* to) {
  const int sizes[] = {
      ForwardWarps::THREADS, FORWARD_BYTES, BackwardWarps::THREADS, BACKWARD_BYTES,  WEIGHT_THREADS, WEIGHTS_BYTES,
      ForwardWarps::THREADS, NORM_BYTES,    BackwardWarps::THREADS, NORM_GRAD_BYTES, ForwardWarps::THREADS, HEAD_BYTES,
      SUM_THREADS, 0, HEAD_GRADS_THREADS, HEAD_GRADS_THREADS * 4,
  };
  for (int i = 0; i < static_cast<int>(sizeof(sizes) / sizeof(int)); i++) to[i] = sizes[i];
}
