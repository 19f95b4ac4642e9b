// A layer backwards, and the first norm by itself.
#pragma once
#include "tiles.h"

using BackwardWarps = Warps<K, SOURCE>;
using BackwardMaps = Maps<N, SIDE, 1>;

// What the gradient of a norm needs, for the threads of a program: gradients that are zero where ReLU was.
template <int CHANNELS, int LENGTH, int THREADS>
struct NormGrad {
  using Whole = Maps<CHANNELS, LENGTH, 0>;
  using Sums = Shares<CHANNELS, THREADS, false>;
  static constexpr int NUM = Whole::COUNT / THREADS;  // octets of a thread, all of the same channels
  static constexpr int FLOATS = 3 * CHANNELS;  // of `factors`: what gradients and maps are multiplied by, what is added

  const Octet *grad, *maps;
  int image;
  Octet value[NUM], was[NUM];

  static DEVICE int at(int j) { return j * THREADS + thread(); }

  DEVICE void load() {
#pragma unroll
    for (int j = 0; j < NUM; j++) {
      value[j] = grad[image * Whole::COUNT + at(j)];
      was[j] = maps[image * Whole::COUNT + at(j)];
    }
  }

  // Has one `sync_block` inside; the caller adds another before `factors` are read.
  static DEVICE void prepare(const float* shares, int num_shares, int batch_pixels, const float* kept,
                             float* grad_shift, float* grad_scale, float* scratch, float* factors) {
    const int n = thread();
    const bool own = n < CHANNELS;  // a thread has a channel
    const float mean = own ? kept[n] : 0, rstd = own ? kept[CHANNELS + n] : 0;
    const float factor = own ? kept[2 * CHANNELS + n] : 0;
    Sums::add_up(shares, num_shares, scratch);
    sync_block();
    if (!own) return;
    const float sum = Sums::total(scratch, 0, n), product = Sums::total(scratch, 0, CHANNELS + n);
    const float by_maps = -factor * rstd * (product / batch_pixels);
    factors[n] = factor;
    factors[CHANNELS + n] = by_maps;
    factors[2 * CHANNELS + n] = -factor * (sum / batch_pixels) - by_maps * mean;
    if (program() == 0) {
      grad_shift[n] = sum;
      grad_scale[n] = product;
    }
  }

  DEVICE Octet result(int j, const Eight& factor, const Eight& by_maps, const Eight& offset) const {
    float result[8];
#pragma unroll
    for (int c = 0; c < 8; c++)
      result[c] = channel(value[j], c) * factor.value[c] + (channel(was[j], c) * by_maps.value[c] + offset.value[c]);
    return packed(result);
  }
};

using BackwardNorm = NormGrad<N, SIDE, BackwardWarps::THREADS>;
constexpr int BACKWARD_FLOATS = at_least(at_least(BackwardNorm::Sums::FLOATS, BackwardWarps::GROUPS * 2 * K),
                                         BackwardWarps::SPLIT > 1 ? BackwardWarps::NUM / 2 * TILES * 8 * WARP : 0);
constexpr int BACKWARD_BYTES = BackwardMaps::BYTES + WEIGHT_BYTES + BackwardWarps::STAGES_BYTES +
                               (BACKWARD_FLOATS + BackwardNorm::FLOATS + 4 * K) * 4;

// What `backward_layer` begins with, for the first layer, whose source needs no gradient.
KERNEL(BackwardWarps::THREADS)
norm_backward(const Octet* grad, const Octet* maps, const float* kept, const float* grad_shares, float* grad_shift,
              float* grad_scale, Octet* grad_maps, int num_shares, int batch_pixels, int images) {
  float* const scratch = reinterpret_cast<float*>(shared_memory());
  wait_for_launch_before();
  for (int i = 0; i < images; i++) {
    BackwardNorm norm = {grad, maps, program() * images + i};
    norm.load();
    if (i == 0) {
      BackwardNorm::prepare(grad_shares, num_shares, batch_pixels, kept, grad_shift, grad_scale, scratch,
                            scratch + BackwardNorm::Sums::FLOATS);
      sync_block();
    }
    const float* const factors = scratch + BackwardNorm::Sums::FLOATS;
    const int octet = thread() % BackwardNorm::Whole::OCTETS;
    const Eight factor = eight(factors, octet), by_maps = eight(factors + N, octet);
    const Eight offset = eight(factors + 2 * N, octet);
#pragma unroll
    for (int j = 0; j < BackwardNorm::NUM; j++)
      grad_maps[norm.image * BackwardNorm::Whole::COUNT + norm.at(j)] = norm.result(j, factor, by_maps, offset);
  }
}
constexpr int NORM_GRAD_BYTES = (BackwardNorm::Sums::FLOATS + BackwardNorm::FLOATS) * 4;

// The gradient of what a layer's norm gave becomes that of its convolution's result, and that of its source.
//
//   grad                    of the norm's result, zero where ReLU was
//   maps, kept              the convolution's result, and what `forward_layer` kept of its norm
//   grad_shares             `num_shares`: [2][N], sums of `grad` and of grad * normed maps
//   grad_shift, grad_scale  become the norm's
//   grad_maps               becomes that of `maps`, for `weight_grads`
//   below, below_kept       the layer below, as in `forward_layer`
//   source                  what came of it, where a shortcut was added; else null
//   over                    the gradient of what a shortcut that begins at the source goes to, zero where its ReLU was,
//                           N channels, or null; where N is 2 K the source's channels begin at `pad`
//   grad_source             becomes the gradient of the norm's result below, zero where its ReLU was
//   shares                  become shares of the sums of it, one a program
KERNEL(BackwardWarps::THREADS)
backward_layer(const Octet* grad, const Octet* maps, const float* kept, const float* grad_shares, float* grad_shift,
               float* grad_scale, Octet* grad_maps, const Octet* weight, const Octet* below, const float* below_kept,
               const Octet* source, const Octet* over, Octet* grad_source, float* shares, int num_shares,
               int batch_pixels, int images, int pad) {
  using Own = BackwardWarps;
  using Target = BackwardMaps;
  Octet* const window = reinterpret_cast<Octet*>(shared_memory());
  Octet* const weights = window + Target::BYTES / 16;
  Octet* const stages = weights + WEIGHT_BYTES / 16;
  float* const scratch = reinterpret_cast<float*>(stages + Own::STAGES_BYTES / 16);
  float* const factors = scratch + BACKWARD_FLOATS;
  float* const pre_norm_kept = factors + BackwardNorm::FLOATS;

  const auto [warp, lane, group, column, part] = Own::seat();
  const int own = column * 2 + lane % 2;  // octet of the result
  begin_weights(weights, weight, Own::THREADS);
  Target::clear_border(window, Own::THREADS);
  wait_for_launch_before();
  float sum_so_far = 0;  // of number `thread()` of 2 K

  for (int i = 0; i < images; i++) {
    const int image = program() * images + i;
    BackwardNorm norm = {grad, maps, image};
    norm.load();
    if (i == 0) {
      for (int j = thread(); j < 4 * K; j += Own::THREADS) pre_norm_kept[j] = below_kept[j];
      BackwardNorm::prepare(grad_shares, num_shares, batch_pixels, kept, grad_shift, grad_scale, scratch, factors);
      sync_block();
    }
    const int octet = thread() % Target::OCTETS;
    const Eight factor = eight(factors, octet), by_maps = eight(factors + N, octet);
    const Eight offset = eight(factors + 2 * N, octet);
#pragma unroll
    for (int j = 0; j < BackwardNorm::NUM; j++) {
      const Octet whole = norm.result(j, factor, by_maps, offset);
      window[Target::of(norm.at(j))] = whole;
      grad_maps[image * Target::COUNT + norm.at(j)] = whole;
    }
    cp_async_wait_all();
    sync_block();

    // What the end needs is under way while the products are made.
    Octet pre_norm[TILES], result[TILES], over_grad[TILES];
    int at[TILES];
    if (part == 0)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const Place there = place<SOURCE, STRIDE == 2>(group, tile, lane / 2);
        at[tile] = ((image * SOURCE + there.row) * SOURCE + there.column) * (K / 8) + own;
        pre_norm[tile] = below[at[tile]];
        if (source) result[tile] = source[at[tile]];
        over_grad[tile] = zeros();
        if (over) {
          if (N == K)
            over_grad[tile] = over[at[tile]];
          else if (there.row % 2 == 0 && there.column % 2 == 0)
            over_grad[tile] =
                over[((image * SOURCE + there.row) / 2 * SIDE + there.column / 2) * (N / 8) + own + pad / 8];
        }
      }
    float acc[TILES][2][4];
    constexpr int STEPS = N / TILE / Own::SPLIT;
    convolve<SOURCE, true, Target>(acc, window, weights, group, column, part * STEPS, (part + 1) * STEPS);
    if constexpr (Own::SPLIT > 1) {
      add_halves<Own>(acc, scratch, warp);
      sync_block();
    }
    if (part == 0) {
      Octet* const stage = stages + warp * (STAGE_BYTES / 16);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int run = 0; run < 2; run++) {
            u32* to = reinterpret_cast<u32*>(stage + half * STAGE_PLANE + tile * TILE + run * 8 + lane / 4);
            to[lane % 4] = pack(acc[tile][half][2 * run], acc[tile][half][2 * run + 1]);
          }
      sync_warp();
      const Eight mean = eight(pre_norm_kept, own), rstd = eight(pre_norm_kept + K, own);
      const Eight factor = eight(pre_norm_kept + 2 * K, own), offset = eight(pre_norm_kept + 3 * K, own);
      float sums[16] = {};  // of 8 channels; then of products
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const Octet made = stage[lane % 2 * STAGE_PLANE + tile * TILE + lane / 2];
        float gradient[8];
#pragma unroll
        for (int c = 0; c < 8; c++) {
          const float relu_input =
              source ? channel(result[tile], c) : channel(pre_norm[tile], c) * factor.value[c] + offset.value[c];
          gradient[c] = relu_input > 0 ? channel(made, c) + channel(over_grad[tile], c) : 0;
        }
        const Octet whole = packed(gradient);
        grad_source[at[tile]] = whole;
#pragma unroll
        for (int c = 0; c < 8; c++) {
          sums[c] += channel(whole, c);
          sums[8 + c] += channel(whole, c) * (channel(pre_norm[tile], c) - mean.value[c]);
        }
      }
#pragma unroll
      for (int c = 0; c < 8; c++) sums[8 + c] *= rstd.value[c];
      scatter_sums<8, 16>(sums);
      const int of = lane / 2;  // which 8, and channel
      scratch[(group * 2 + of / 8) * K + own * 8 + of % 8] = sums[0];
    }
    sync_block();
    for (int j = thread(); j < 2 * K; j += Own::THREADS)
      for (int g = 0; g < Own::GROUPS; g++) sum_so_far += scratch[g * 2 * K + j];
  }
  static_assert(2 * K <= Own::THREADS, "a thread has one sum");
  if (thread() < 2 * K) shares[program() * 2 * K + thread()] = sum_so_far;
}
