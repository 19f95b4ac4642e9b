// Maps of an image in shared memory, a convolution of them by a program's warps, and sums over pixels and programs.
#pragma once
#include "machine.h"

constexpr int SOURCE = SIDE * STRIDE;
constexpr int WARP = 32, TILE = 16;  // lanes; pixels or channels of a tile
constexpr int TILES = 4;             // of 16 pixels each, of a warp
constexpr int IMAGE_CHANNELS = 3;    // FIRST: what there is of K in memory, the rest are zeros
constexpr int WEIGHT_ROW = N + 1;    // octets: one more than are there, to avoid bank conflicts

// 8 channels' numbers, of rows of a multiple of 8.
struct alignas(16) Eight { float value[8]; };
DEVICE Eight eight(const float* row, int octet) { return reinterpret_cast<const Eight*>(row)[octet]; }

DEVICE Octet zeros() { return Octet{{0, 0, 0, 0}}; }

// Maps of one image in shared memory.
template <int CHANNELS, int LENGTH, int BORDER>
struct Maps {
  static constexpr int OCTETS = CHANNELS / 8, WIDTH = LENGTH + 2 * BORDER, PIXELS = LENGTH * LENGTH;
  // Octets from plane to plane, such that those of one pixel lie in different banks.
  static constexpr int PLANE = (WIDTH * WIDTH + 7) / 8 * 8 + at_least(8 / OCTETS, 1);
  static constexpr int BYTES = OCTETS * PLANE * 16;
  static constexpr int COUNT = OCTETS * PIXELS;  // octets in memory, where those of a pixel are neighbours

  static DEVICE int at(int octet, int row, int column) { return octet * PLANE + row * WIDTH + column; }
  // Of what lies at some place in memory.
  static DEVICE int of(int place) {
    const int pixel = place / OCTETS;
    return at(place % OCTETS, pixel / LENGTH + BORDER, pixel % LENGTH + BORDER);
  }
  static DEVICE void clear_border(Octet* maps, int threads) {
    constexpr int LAST = WIDTH - 1;
    for (int i = thread(); i < OCTETS * 4 * LAST; i += threads) {
      const int octet = i / (4 * LAST), side = i / LAST % 4, along = i % LAST;
      const int there = side < 2 ? along : LAST - along, other = side % 3 ? LAST : 0;  // clockwise, from the top left
      maps[side % 2 ? at(octet, there, other) : at(octet, other, there)] = zeros();
    }
  }
};

constexpr int STAGE_PLANE = TILES * TILE + 4;  // octets: of a warp's result, two planes; their banks differ
constexpr int STAGE_BYTES = 2 * STAGE_PLANE * 16;

// The warps of a program that makes LENGTH x LENGTH pixels of CHANNELS channels.
template <int CHANNELS, int LENGTH>
struct Warps {
  static constexpr int GROUPS = LENGTH * LENGTH / (TILES * TILE), COLUMNS = CHANNELS / TILE;
  static constexpr int SPLIT = GROUPS * COLUMNS < 8 ? 2 : 1;  // so many share a product's terms, to have 8 warps
  static constexpr int NUM = GROUPS * COLUMNS * SPLIT, THREADS = NUM * WARP;
  static constexpr int STAGES_BYTES = GROUPS * COLUMNS * STAGE_BYTES;  // of those that end with a result

  struct Seat { int warp, lane, group, column, part; };  // the thread's; of its warp: 64 pixels, 16 channels, terms
  static DEVICE Seat seat() {
    const int warp = thread() / WARP, tile = warp % (GROUPS * COLUMNS);
    return {warp, thread() % WARP, tile / COLUMNS, tile % COLUMNS, warp / (GROUPS * COLUMNS)};
  }
};

// The i-th of a tile's 16 pixels, of LENGTH x LENGTH in 64s. SPREAD: every second column (and row) goes together, since
// a convolution of stride 2 goes to those from the same weights.
struct Place { int row, column; };
template <int LENGTH, bool SPREAD>
DEVICE Place place(int group, int tile, int i) {
  if (LENGTH == 8) return {2 * tile + i / 8, i % 8};
  if (LENGTH == 16 && SPREAD) return {4 * group + tile / 2 + i / 8 * 2, i % 8 * 2 + tile % 2};
  if (LENGTH == 16) return {4 * group + tile, i};
  if (SPREAD) return {group / 2 * 4 + tile, 2 * i + group % 2};
  return {group / 2 * 4 + tile, group % 2 * 16 + i};
}

// acc[tile][8 channels][...]: the convolution of what lies in `maps`, which has a border, or the gradient of its source
// (`TRANSPOSED`), 16 channels at `column`, by some steps of 16 terms.
template <int LENGTH, bool TRANSPOSED, typename Source>
DEVICE void convolve(float (&acc)[TILES][2][4], const Octet* maps, const Octet* weight, int group, int column,
                     int begin, int end) {
  const int lane = thread() % WARP, row_of = lane % 8, first = lane / 8 % 2, second = lane / 16;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[tile][half][i] = 0;
  const auto weights = [&](u32 (&b)[4], int tap, int step) {
    if (TRANSPOSED) {
      const int octet = tap * (K / 8) + column * 2 + second;
      ldmatrix_x4_trans(b, weight + octet * WEIGHT_ROW + step * TILE + first * 8 + row_of);
    } else {
      const int octet = tap * (K / 8) + step * 2 + first;
      ldmatrix_x4(b, weight + octet * WEIGHT_ROW + column * TILE + second * 8 + row_of);
    }
  };
  for (int step = begin; step < end; step++) {
    const int octet = step * 2 + second;
    if (STRIDE == 1 && LENGTH >= 16) {
      const Place corner = place<LENGTH, false>(group, 0, 0);
#pragma unroll
      for (int dx = 0; dx < 3; dx++) {
        u32 a[TILES + 2][4];  // a row of the window serves three of the result
#pragma unroll
        for (int r = 0; r < TILES + 2; r++)
          ldmatrix_x4(a[r], maps + Source::at(octet, corner.row + r, corner.column + dx + first * 8 + row_of));
#pragma unroll
        for (int dy = 0; dy < 3; dy++) {
          u32 b[4];
          weights(b, TRANSPOSED ? 8 - dy * 3 - dx : dy * 3 + dx, step);
#pragma unroll
          for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int half = 0; half < 2; half++)
              mma_m16n8k16(acc[tile][half], a[tile + dy][0], a[tile + dy][1], a[tile + dy][2], a[tile + dy][3],
                           b[2 * half], b[2 * half + 1]);
        }
      }
    } else if (STRIDE == 1) {
#pragma unroll
      for (int dx = 0; dx < 3; dx++) {
        u32 a[TILES + 1][4];  // of two rows each
#pragma unroll
        for (int r = 0; r < TILES + 1; r++) ldmatrix_x4(a[r], maps + Source::at(octet, 2 * r + first, dx + row_of));
#pragma unroll
        for (int dy = 0; dy < 3; dy++) {
          u32 b[4];
          weights(b, TRANSPOSED ? 8 - dy * 3 - dx : dy * 3 + dx, step);
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            const int r = tile + dy / 2, odd = dy % 2, next = r + odd;
#pragma unroll
            for (int half = 0; half < 2; half++)
              mma_m16n8k16(acc[tile][half], a[r][odd], a[next][1 - odd], a[r][2 + odd], a[next][3 - odd], b[2 * half],
                           b[2 * half + 1]);
          }
        }
      }
    } else {
#pragma unroll
      for (int tap = 0; tap < 9; tap++) {
        u32 b[4];
        weights(b, tap, step);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          Place at = place<LENGTH, TRANSPOSED>(group, tile, first * 8 + row_of);
          if (TRANSPOSED) {
            at = {at.row + 1 - tap / 3, at.column + 1 - tap % 3};
            if ((at.row | at.column) & 1) continue;  // all lanes or none
            at = {at.row / 2 + 1, at.column / 2 + 1};
          } else {
            at = {at.row * 2 + tap / 3, at.column * 2 + tap % 3};
          }
          u32 a[4];
          ldmatrix_x4(a, maps + Source::at(octet, at.row, at.column));
#pragma unroll
          for (int half = 0; half < 2; half++)
            mma_m16n8k16(acc[tile][half], a[0], a[1], a[2], a[3], b[2 * half], b[2 * half + 1]);
        }
      }
    }
  }
}

// Add up what the second half of the warps has, into the first half's.
template <typename Own>
DEVICE void add_halves(float (&acc)[TILES][2][4], float* scratch, int warp) {
  const int own = Own::NUM / 2, lane = thread() % WARP;
  float* at = scratch + (warp % own * TILES * 8) * WARP + lane;
  if (warp >= own)
#pragma unroll
    for (int i = 0; i < TILES * 8; i++) at[i * WARP] = acc[i / 8][i / 4 % 2][i % 4];
  sync_block();
  if (warp < own)
#pragma unroll
    for (int i = 0; i < TILES * 8; i++) acc[i / 8][i / 4 % 2][i % 4] += at[i * WARP];
}

// Butterfly sum over lanes of 2 * HALF values: each lane ends with one total in value[0], chosen by its bits from MASK
// down.
template <int HALF, int MASK, int NUM>
DEVICE void scatter_sums(float (&value)[NUM]) {
  const bool upper = thread() & MASK;
#pragma unroll
  for (int i = 0; i < HALF; i++) {
    const float keep = upper ? value[i + HALF] : value[i], give = upper ? value[i] : value[i + HALF];
    value[i] = keep + shuffle_xor(give, MASK);
  }
  if constexpr (HALF > 1) scatter_sums<HALF / 2, MASK / 2>(value);
}

// Sums over shares, rows of 2 * CHANNELS, by all threads: scratch[0][...], and of squared differences from the first
// row (`SQUARES`): scratch[1][...].
template <int CHANNELS, int THREADS, bool SQUARES>
struct Shares {
  static constexpr int QUADS = CHANNELS / 2, ROWS = THREADS / QUADS, WARPS = THREADS / WARP;
  static constexpr int FLOATS = WARPS * 2 * 2 * CHANNELS;
  static constexpr int AHEAD = at_least(128 / ROWS, 2);  // rows that are asked for at once: of 128 programs all
  struct alignas(16) Quad { float value[4]; };

  static DEVICE void add_up(const float* shares, int num, float* scratch) {
    const int quad = thread() % QUADS;
    const Quad* column = reinterpret_cast<const Quad*>(shares) + quad;
    float sum[4] = {}, squares[4] = {};
    Quad pivot = {};
    if (SQUARES) pivot = *column;
#pragma unroll(AHEAD)
    for (int share = thread() / QUADS; share < num; share += ROWS) {
      const Quad row = column[share * QUADS];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float off = row.value[i] - pivot.value[i];
        sum[i] += off;
        squares[i] += off * off;
      }
    }
#pragma unroll
    for (int mask = WARP / 2; mask >= QUADS; mask /= 2)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sum[i] += shuffle_xor(sum[i], mask);
        if (SQUARES) squares[i] += shuffle_xor(squares[i], mask);
      }
    if (thread() % WARP < QUADS) {
      float* to = scratch + thread() / WARP * (2 * 2 * CHANNELS) + quad * 4;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        to[i] = sum[i];
        if (SQUARES) to[2 * CHANNELS + i] = squares[i];
      }
    }
  }
  // After a `sync_block`.
  static DEVICE float total(const float* scratch, int which, int i) {
    float total = 0;
    for (int warp = 0; warp < WARPS; warp++) total += scratch[(warp * 2 + which) * (2 * CHANNELS) + i];
    return total;
  }
};

// Red, green and blue of a pixel, or a weight's, and five zeros.
DEVICE Octet of_image(const Octet* images, int pixel) {
  const u16* colour = reinterpret_cast<const u16*>(images) + pixel * IMAGE_CHANNELS;
  return Octet{{colour[0] | static_cast<u32>(colour[1]) << 16, colour[2], 0, 0}};
}

DEVICE void begin_weights(Octet* to, const Octet* weight, int threads) {
  for (int i = thread(); i < N * 9 * (K / 8); i += threads) {
    const int octet = i % (K / 8), tap = i / (K / 8) % 9, n = i / (9 * (K / 8));
    Octet* const at = to + (tap * (K / 8) + octet) * WEIGHT_ROW + n;
    if (FIRST)
      *at = octet ? zeros() : of_image(weight, n * 9 + tap);
    else
      cp_async_16(at, weight + i);
  }
}

constexpr int WEIGHT_BYTES = 9 * (K / 8) * WEIGHT_ROW * 16;
