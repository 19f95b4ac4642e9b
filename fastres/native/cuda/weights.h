// Gradients of weights.
#pragma once
#include "tiles.h"

struct Layers {
  const Octet* grad[LAYERS];    // of the convolution's result
  const Octet* source[LAYERS];
  float* shares[LAYERS];        // [programs][weights]
};

constexpr int WEIGHT_WARPS = 16, WEIGHT_THREADS = WEIGHT_WARPS * WARP;
constexpr int WEIGHT_TILES = (N / TILE) * (K / TILE), PIXEL_GROUPS = WEIGHT_WARPS / WEIGHT_TILES;
constexpr int GROUP_ROWS = SIDE / PIXEL_GROUPS;                // of the target's maps
constexpr int GROUP_TILES = GROUP_ROWS * SIDE / TILE;          // of 16 pixels
using GradMaps = Maps<N, SIDE, 0>;
using SourceMaps = Maps<K, SOURCE, 1>;
constexpr int PAIR_BYTES = GradMaps::BYTES + SourceMaps::BYTES;
constexpr int WEIGHTS_BYTES = at_least(2 * PAIR_BYTES, PIXEL_GROUPS > 1 ? PIXEL_GROUPS * 9 * K * N * 4 : 0);

// Shares of the gradients of many layers' weights: [out][row][column][in], float32. A warp has 16 x 16 channels at all
// nine taps, and some rows of pixels; programs have some of the images each.
KERNEL(WEIGHT_THREADS) weight_grads(const Layers layers, int num_images) {
  Octet* const memory = reinterpret_cast<Octet*>(shared_memory());
  const Octet* const grad = layers.grad[which_layer()];
  const Octet* const source = layers.source[which_layer()];
  const int begin = program() * num_images / num_programs(), end = (program() + 1) * num_images / num_programs();
  const int warp = thread() / WARP, lane = thread() % WARP, row_of = lane % 8, first = lane / 8 % 2, second = lane / 16;
  const int tile = warp % WEIGHT_TILES, group = warp / WEIGHT_TILES, out = tile / (K / TILE), in = tile % (K / TILE);
  const auto fetch = [&](int image, Octet* to) {
    for (int i = thread(); i < GradMaps::COUNT; i += WEIGHT_THREADS)
      cp_async_16(to + GradMaps::of(i), grad + image * GradMaps::COUNT + i);
    to += GradMaps::BYTES / 16;
    for (int i = thread(); i < SourceMaps::COUNT; i += WEIGHT_THREADS) {
      Octet* const at = to + SourceMaps::of(i);
      if (FIRST)
        *at = i % SourceMaps::OCTETS ? zeros() : of_image(source, image * SourceMaps::PIXELS + i / SourceMaps::OCTETS);
      else
        cp_async_16(at, source + image * SourceMaps::COUNT + i);
    }
  };
  for (int which = 0; which < 2; which++)
    SourceMaps::clear_border(memory + (which * PAIR_BYTES + GradMaps::BYTES) / 16, WEIGHT_THREADS);
  float acc[9][2][4] = {};
  wait_for_launch_before();
  fetch(begin, memory);
  for (int image = begin; image < end; image++) {
    const Octet* const own = memory + (image - begin) % 2 * (PAIR_BYTES / 16);
    const Octet* const window = own + GradMaps::BYTES / 16;
    cp_async_wait_all();
    sync_block();
    if (image + 1 < end) fetch(image + 1, memory + (image + 1 - begin) % 2 * (PAIR_BYTES / 16));
    u32 a[GROUP_TILES][4];
#pragma unroll
    for (int t = 0; t < GROUP_TILES; t++)
      ldmatrix_x4_trans(
          a[t], own + GradMaps::at(out * 2 + first, 0, (group * GROUP_TILES + t) * TILE + second * 8 + row_of));
    const int octet = in * 2 + second;
    if (STRIDE == 1 && SIDE >= 16) {
      constexpr int ACROSS = SIDE / TILE;
#pragma unroll
      for (int dx = 0; dx < 3; dx++)
#pragma unroll
        for (int part = 0; part < ACROSS; part++)
#pragma unroll
          for (int r = 0; r < GROUP_ROWS + 2; r++) {
            u32 b[4];
            ldmatrix_x4_trans(
                b, window + SourceMaps::at(octet, group * GROUP_ROWS + r, part * TILE + dx + first * 8 + row_of));
#pragma unroll
            for (int dy = 0; dy < 3; dy++) {
              const int row = r - dy;
              if (row < 0 || row >= GROUP_ROWS) continue;
              const u32(&g)[4] = a[row * ACROSS + part];
#pragma unroll
              for (int half = 0; half < 2; half++)
                mma_m16n8k16(acc[dy * 3 + dx][half], g[0], g[1], g[2], g[3], b[2 * half], b[2 * half + 1]);
            }
          }
    } else if (STRIDE == 1) {
#pragma unroll
      for (int dx = 0; dx < 3; dx++) {
        u32 b[5][4];  // of two rows each
#pragma unroll
        for (int r = 0; r < 5; r++)
          ldmatrix_x4_trans(b[r], window + SourceMaps::at(octet, 2 * r + first, dx + row_of));
#pragma unroll
        for (int dy = 0; dy < 3; dy++)
#pragma unroll
          for (int t = 0; t < GROUP_TILES; t++) {
            const int r = t + dy / 2, odd = dy % 2, next = r + odd;
#pragma unroll
            for (int half = 0; half < 2; half++)
              mma_m16n8k16(acc[dy * 3 + dx][half], a[t][0], a[t][1], a[t][2], a[t][3], b[r][2 * half + odd],
                           b[next][2 * half + 1 - odd]);
          }
      }
    } else {
#pragma unroll
      for (int t = 0; t < GROUP_TILES; t++) {
        const int pixel = (group * GROUP_TILES + t) * TILE + first * 8 + row_of;
#pragma unroll
        for (int tap = 0; tap < 9; tap++) {
          u32 b[4];
          ldmatrix_x4_trans(
              b, window + SourceMaps::at(octet, pixel / SIDE * 2 + tap / 3, pixel % SIDE * 2 + tap % 3));
#pragma unroll
          for (int half = 0; half < 2; half++)
            mma_m16n8k16(acc[tap][half], a[t][0], a[t][1], a[t][2], a[t][3], b[2 * half], b[2 * half + 1]);
        }
      }
    }
  }
  constexpr int THERE = FIRST ? IMAGE_CHANNELS : K;
  float* const share = layers.shares[which_layer()] + program() * (9 * THERE * N);
  float* const to = PIXEL_GROUPS > 1 ? reinterpret_cast<float*>(memory) + group * (9 * K * N) : share;
  if (PIXEL_GROUPS > 1) sync_block();
#pragma unroll
  for (int tap = 0; tap < 9; tap++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int run = 0; run < 2; run++) {
        float* at = to + ((out * TILE + run * 8 + lane / 4) * 9 + tap) * K + in * TILE + half * 8 + lane % 4 * 2;
        at[0] = acc[tap][half][2 * run];
        at[1] = acc[tap][half][2 * run + 1];
      }
  if (PIXEL_GROUPS > 1) {
    sync_block();
    for (int i = thread(); i < 9 * THERE * N; i += WEIGHT_THREADS) {
      const float* at = reinterpret_cast<const float*>(memory) + i / THERE * K + i % THERE;
      float total = 0;
#pragma unroll
      for (int g = 0; g < PIXEL_GROUPS; g++) total += at[g * (9 * K * N)];
      share[i] = total;
    }
  }
}

// Sums of shares of many layers' weights. A program's row of the table: the place of its first share, shares, their
// size, first weight of the layer's, and where the layer's begin in `result`. A thread has one weight.
struct Row { int start, num_shares, size, first, place; };
KERNEL(SUM_THREADS) sum_weight_shares(const float* shares, const Row* table, float* result) {
  const Row row = table[program()];
  wait_for_launch_before();
  const int at = row.first + thread();
  if (at >= row.size) return;
  float total = 0;
#pragma unroll 8
  for (int share = 0; share < row.num_shares; share++) total += shares[row.start + share * row.size + at];
  result[row.place + at] = total;
}
