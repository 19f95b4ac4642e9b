// A layer forwards, and the last norm by itself.
#pragma once
#include "tiles.h"

using ForwardWarps = Warps<N, SIDE>;
using ForwardMaps = Maps<K, SOURCE, 1>;

// What the norm of some maps needs, for the threads of a program.
template <int CHANNELS, int LENGTH, int THREADS>
struct Norm {
  using Whole = Maps<CHANNELS, LENGTH, 0>;
  using Sums = Shares<CHANNELS, THREADS, true>;
  static constexpr int NUM = Whole::COUNT / THREADS;  // octets of a thread, all of the same channels
  static constexpr int FLOATS = 4 * CHANNELS;  // of `factors`: what maps are multiplied by, and is added; mean, 1 / std

  const Octet *below, *add;
  int image, add_channels, pad;
  Octet value[NUM], added[NUM];

  static DEVICE int at(int j) { return j * THREADS + thread(); }

  DEVICE void load() {
#pragma unroll
    for (int j = 0; j < NUM; j++) value[j] = below[image * Whole::COUNT + at(j)];
    if (!add) return;
#pragma unroll
    for (int j = 0; j < NUM; j++) {
      if (add_channels == CHANNELS) {
        added[j] = add[image * Whole::COUNT + at(j)];
      } else {  // every second pixel and row of maps that are twice as long and wide
        const int pixel = at(j) / Whole::OCTETS, from = at(j) % Whole::OCTETS - pad / 8;
        const int row = image * LENGTH + pixel / LENGTH, column = pixel % LENGTH;
        added[j] = zeros();
        if (from >= 0 && from < Whole::OCTETS / 2)
          added[j] = add[(row * 2 * LENGTH * 2 + column * 2) * (Whole::OCTETS / 2) + from];
      }
    }
  }

  // From shares, or without any from the running statistics. Has one `sync_block` inside; the caller adds another
  // before `factors` are read.
  static DEVICE void prepare(const float* shares, int num_shares, int share_pixels, const float* scale,
                             const float* shift, float* running_mean, float* running_var, float* kept, float eps,
                             float momentum, float* scratch, float* factors) {
    const int k = thread();
    const bool own = k < CHANNELS;  // a thread has a channel
    const bool reads = own && (program() == 0 || !num_shares);  // the running statistics
    // Asked for before all wait.
    const float its_scale = own ? scale[k] : 0, its_shift = own ? shift[k] : 0;
    float mean = reads ? running_mean[k] : 0, var = reads ? running_var[k] : 0;
    if (num_shares) Sums::add_up(shares, num_shares, scratch);
    sync_block();
    if (!own) return;
    if (num_shares) {
      const float was_mean = mean, was_var = var;
      const float total = Sums::total(scratch, 0, k), off = total / num_shares;
      mean = shares[k] + off;
      float between = Sums::total(scratch, 1, k) - total * off;  // of the shares' means
      between = between < 0 ? 0 : between;
      const float within = Sums::total(scratch, 0, CHANNELS + k) + shares[CHANNELS + k] * num_shares;
      const float pixels = static_cast<float>(num_shares) * share_pixels;
      var = (within + share_pixels * between) / pixels;
      if (program() == 0) {
        running_mean[k] = was_mean + momentum * (mean - was_mean);
        running_var[k] = was_var + momentum * (var * (pixels / (pixels - 1)) - was_var);
      }
    }
    const float rstd = 1 / root(var + eps), factor = rstd * its_scale, offset = its_shift - mean * factor;
    factors[k] = factor;
    factors[CHANNELS + k] = offset;
    factors[2 * CHANNELS + k] = mean;
    factors[3 * CHANNELS + k] = rstd;
    if (program() == 0 && num_shares) {
      kept[k] = mean;
      kept[CHANNELS + k] = rstd;
      kept[2 * CHANNELS + k] = factor;
      kept[3 * CHANNELS + k] = offset;
    }
  }

  // Maps are bfloat16, so no digit is lost by not taking the mean off first: their own rounding is 2^15 times as much.
  DEVICE Octet result(int j, const Eight& factor, const Eight& offset) const {
    float result[8];
#pragma unroll
    for (int c = 0; c < 8; c++) {
      float x = channel(value[j], c) * factor.value[c] + offset.value[c];
      if (add) x += channel(added[j], c);
      result[c] = relu(x);
    }
    return packed(result);
  }
};

using ForwardNorm = Norm<K, SOURCE, ForwardWarps::THREADS>;
constexpr int FORWARD_FLOATS = at_least(at_least(ForwardNorm::Sums::FLOATS, ForwardWarps::GROUPS * 2 * N),
                                        ForwardWarps::SPLIT > 1 ? ForwardWarps::NUM / 2 * TILES * 8 * WARP : 0);
constexpr int FORWARD_BYTES = ForwardMaps::BYTES + WEIGHT_BYTES + ForwardWarps::STAGES_BYTES +
                              (FORWARD_FLOATS + ForwardNorm::FLOATS) * 4;

// source = ReLU(norm(below) + add), and maps = its convolution. Of the first layer the source are the images, `below`.
//
//   below, below_shares  what the layer below made, (images, SOURCE, SOURCE, K); `num_shares` of `share_pixels` each:
//                        [2][K], mean and sum of squared differences from it; none: by the running statistics
//   add                  what its shortcut begins with, or null: of K channels, or of K / 2 and maps twice as long and
//                        wide, whose every second pixel and row goes to channels from `pad` on
//   kept                 becomes [4][K]: mean, one over the standard deviation, what maps are multiplied by, and what
//                        is then added
//   shares               become those of `maps`, one a program
//   images               of a program
KERNEL(ForwardWarps::THREADS)
forward_layer(const Octet* below, const float* below_shares, const Octet* add, const float* scale, const float* shift,
              float* running_mean, float* running_var, Octet* source, float* kept, const Octet* weight, Octet* maps,
              float* shares, int num_shares, int share_pixels, int images, int add_channels, int pad, float eps,
              float momentum) {
  using Own = ForwardWarps;
  using Source = ForwardMaps;
  Octet* const window = reinterpret_cast<Octet*>(shared_memory());
  Octet* const weights = window + Source::BYTES / 16;
  Octet* const stages = weights + WEIGHT_BYTES / 16;
  float* const scratch = reinterpret_cast<float*>(stages + Own::STAGES_BYTES / 16);
  float* const factors = scratch + FORWARD_FLOATS;

  const auto [warp, lane, group, column, part] = Own::seat();
  begin_weights(weights, weight, Own::THREADS);
  Source::clear_border(window, Own::THREADS);
  wait_for_launch_before();
  float mean_so_far = 0, squares_so_far = 0;  // of channel `thread()`

  for (int i = 0; i < images; i++) {
    const int image = program() * images + i;
    if (FIRST) {
      for (int at = thread(); at < Source::COUNT; at += Own::THREADS)
        window[Source::of(at)] =
            at % Source::OCTETS ? zeros() : of_image(below, image * Source::PIXELS + at / Source::OCTETS);
    } else {
      ForwardNorm norm = {below, add, image, add_channels, pad};
      norm.load();
      if (i == 0) {
        ForwardNorm::prepare(below_shares, num_shares, share_pixels, scale, shift, running_mean, running_var, kept, eps,
                             momentum, scratch, factors);
        sync_block();
      }
      const int octet = thread() % Source::OCTETS;
      const Eight factor = eight(factors, octet), offset = eight(factors + K, octet);
#pragma unroll
      for (int j = 0; j < ForwardNorm::NUM; j++) {
        const Octet whole = norm.result(j, factor, offset);
        window[Source::of(norm.at(j))] = whole;
        source[image * Source::COUNT + norm.at(j)] = whole;
      }
    }
    cp_async_wait_all();
    sync_block();

    float acc[TILES][2][4];
    constexpr int STEPS = K / TILE / Own::SPLIT;
    convolve<SIDE, false, Source>(acc, window, weights, group, column, part * STEPS, (part + 1) * STEPS);
    if constexpr (Own::SPLIT > 1) {
      add_halves<Own>(acc, scratch, warp);
      sync_block();
    }
    if (part == 0) {
      Octet* const stage = stages + warp * (STAGE_BYTES / 16);
      float pivot[4], sums[8] = {};  // of channels 8 half + 2 (lane % 4) + e: [half][e]; then of squares
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int run = 0; run < 2; run++) {
            const u32 pair = pack(acc[tile][half][2 * run], acc[tile][half][2 * run + 1]);
            u32* to = reinterpret_cast<u32*>(stage + half * STAGE_PLANE + tile * TILE + run * 8 + lane / 4);
            to[lane % 4] = pair;
            const float x[2] = {low(pair), high(pair)};
#pragma unroll
            for (int e = 0; e < 2; e++) {
              if (tile == 0 && run == 0) pivot[half * 2 + e] = shuffle(x[e], lane % 4);
              const float off = x[e] - pivot[half * 2 + e];
              sums[half * 2 + e] += off;
              sums[4 + half * 2 + e] += off * off;
            }
          }
      scatter_sums<4, 16>(sums);
      const int of = lane / 4 % 4;  // lanes below 16 have sums, the others those of squares
      const float squares = shuffle_xor(sums[0], 16), off = sums[0] / (TILES * TILE);
      if (lane < 16) {
        float* to = scratch + group * 2 * N + column * TILE + of / 2 * 8 + lane % 4 * 2 + of % 2;
        to[0] = (of == 0 ? pivot[0] : of == 1 ? pivot[1] : of == 2 ? pivot[2] : pivot[3]) + off;
        to[N] = squares - sums[0] * off;
      }
      sync_warp();
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const Place at = place<SIDE, false>(group, tile, lane / 2);
        maps[((image * SIDE + at.row) * SIDE + at.column) * (N / 8) + column * 2 + lane % 2] =
            stage[lane % 2 * STAGE_PLANE + tile * TILE + lane / 2];
      }
    }
    sync_block();
    if (thread() < N) {  // images so far and this one, groups of 64 pixels each: Chan, Golub and LeVeque 1979
      float mean = 0, squares = 0;
      for (int g = 0; g < Own::GROUPS; g++) mean += scratch[g * 2 * N + thread()];
      mean /= Own::GROUPS;
      for (int g = 0; g < Own::GROUPS; g++) {
        const float off = scratch[g * 2 * N + thread()] - mean;
        squares += scratch[(g * 2 + 1) * N + thread()] + TILES * TILE * off * off;
      }
      const float delta = mean - mean_so_far;
      mean_so_far += delta / (i + 1);
      squares_so_far += squares + delta * delta * (SIDE * SIDE * (static_cast<float>(i) / (i + 1)));
    }
  }
  if (thread() < N) {
    shares[program() * 2 * N + thread()] = mean_so_far;
    shares[program() * 2 * N + N + thread()] = squares_so_far;
  }
}

// What `forward_layer` begins with, for the last layer's maps, (images, SIDE, SIDE, N), in evaluation.
KERNEL(ForwardWarps::THREADS)
norm_forward(const Octet* maps, const Octet* add, const float* scale, const float* shift, float* running_mean,
             float* running_var, Octet* result, int images, int add_channels, int pad, float eps) {
  using Own = Norm<N, SIDE, ForwardWarps::THREADS>;
  float* const factors = reinterpret_cast<float*>(shared_memory());
  wait_for_launch_before();
  for (int i = 0; i < images; i++) {
    Own norm = {maps, add, program() * images + i, add_channels, pad};
    norm.load();
    if (i == 0) {
      Own::prepare(nullptr, 0, 0, scale, shift, running_mean, running_var, nullptr, eps, 0, nullptr, factors);
      sync_block();
    }
    const int octet = thread() % Own::Whole::OCTETS;
    const Eight factor = eight(factors, octet), offset = eight(factors + N, octet);
#pragma unroll
    for (int j = 0; j < Own::NUM; j++)
      result[norm.image * Own::Whole::COUNT + norm.at(j)] = norm.result(j, factor, offset);
  }
}
constexpr int NORM_BYTES = Norm<N, SIDE, ForwardWarps::THREADS>::FLOATS * 4;
