// A layer of a CIFAR network in training on a GPU, compiled for one kind of layer by -D:
//
//   SIDE    of the target's maps, pixels: 32, 16, 8
//   STRIDE  1 or 2: the source's maps are SIDE * STRIDE
//   K, N    channels of source and target: 16, 32, 64
//   FIRST   1 for the first layer, whose source are the images: 3 channels, K = 16
//
// A program (block of threads) takes whole images, one after the other, so nothing is read twice and no border is
// exchanged. Maps and weights are bfloat16, channels last; sums and all between are float32.
//
// `forward_layer` begins with the norm of the layer below, which needs its statistics over the batch, and ends with
// shares of the statistics of its own maps: one launch a layer. `backward_layer` is its mirror. A program's share is one
// row of two numbers a channel; the next launch's programs each sum all rows by themselves, in one order: the same bits
// every time. Gradients of weights wait for no one, so `weight_grads` makes those of many layers in one launch.
//
// Products are mma.m16n8k16. A warp has 64 pixels and 16 channels of the result: 4 tiles of 16 pixels, each two runs of
// 8 neighbours in a row, by 2 tiles of 8 channels. In shared memory maps lie in planes of 8 channels (an Octet, 16
// bytes): 8 neighbours are 128 bytes, which all banks give at once, whatever the window's place.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16816-float

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#ifdef __CUDACC_RTC__
#define DEVICE __device__ __forceinline__
// Of programs of up to 256 threads two fit a multiprocessor: the next launch's, or another network's beside it.
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, (threads) > 256 ? 1 : 2)
#define CONSTANT extern "C" __constant__
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
DEVICE void wait_for_all() { __syncthreads(); }
DEVICE void wait_for_warp() { __syncwarp(); }
DEVICE float from_lane_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE float from_lane(float value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
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
DEVICE void copy_begin(Octet* shared, const Octet* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
DEVICE void copies_end() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Four 8 x 8 matrices, whose 8 rows of 16 bytes lanes 0 to 7, 8 to 15 and so on point to.
DEVICE void matrices(u32 (&to)[4], const Octet* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void matrices_transposed(u32 (&to)[4], const Octet* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void multiply_add(float (&acc)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
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

constexpr int SOURCE = SIDE * STRIDE;
constexpr int WARP = 32, TILE = 16;  // lanes; pixels or channels of a tile
constexpr int TILES = 4;             // of 16 pixels each, of a warp
constexpr int IMAGE_CHANNELS = 3;    // FIRST: what there is of K in memory, the rest are zeros
constexpr int WEIGHT_ROW = N + 1;    // octets: one more than are there, so that columns do not meet in a bank either

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

// The warps of a program that makes LENGTH x LENGTH pixels of CHANNELS channels.
template <int CHANNELS, int LENGTH>
struct Warps {
  static constexpr int GROUPS = LENGTH * LENGTH / (TILES * TILE), COLUMNS = CHANNELS / TILE;
  static constexpr int SPLIT = GROUPS * COLUMNS < 8 ? 2 : 1;  // so many share a product's terms, to have 8 warps
  static constexpr int NUM = GROUPS * COLUMNS * SPLIT, THREADS = NUM * WARP;
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
DEVICE void convolve(float (&acc)[TILES][2][4], const Octet* maps, const Octet* weight, int group, int column, int begin, int end) {
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
      matrices_transposed(b, weight + octet * WEIGHT_ROW + step * TILE + first * 8 + row_of);
    } else {
      const int octet = tap * (K / 8) + step * 2 + first;
      matrices(b, weight + octet * WEIGHT_ROW + column * TILE + second * 8 + row_of);
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
          matrices(a[r], maps + Source::at(octet, corner.row + r, corner.column + dx + first * 8 + row_of));
#pragma unroll
        for (int dy = 0; dy < 3; dy++) {
          u32 b[4];
          weights(b, TRANSPOSED ? 8 - dy * 3 - dx : dy * 3 + dx, step);
#pragma unroll
          for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int half = 0; half < 2; half++)
              multiply_add(acc[tile][half], a[tile + dy][0], a[tile + dy][1], a[tile + dy][2], a[tile + dy][3],
                           b[2 * half], b[2 * half + 1]);
        }
      }
    } else if (STRIDE == 1) {
#pragma unroll
      for (int dx = 0; dx < 3; dx++) {
        u32 a[TILES + 1][4];  // of two rows each
#pragma unroll
        for (int r = 0; r < TILES + 1; r++) matrices(a[r], maps + Source::at(octet, 2 * r + first, dx + row_of));
#pragma unroll
        for (int dy = 0; dy < 3; dy++) {
          u32 b[4];
          weights(b, TRANSPOSED ? 8 - dy * 3 - dx : dy * 3 + dx, step);
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            const int r = tile + dy / 2, odd = dy % 2, next = r + odd;
#pragma unroll
            for (int half = 0; half < 2; half++)
              multiply_add(acc[tile][half], a[r][odd], a[next][1 - odd], a[r][2 + odd], a[next][3 - odd], b[2 * half],
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
          matrices(a, maps + Source::at(octet, at.row, at.column));
#pragma unroll
          for (int half = 0; half < 2; half++)
            multiply_add(acc[tile][half], a[0], a[1], a[2], a[3], b[2 * half], b[2 * half + 1]);
        }
      }
    }
  }
}

// Add up what the second half of the warps has, into the first half's.
template <typename Own>
DEVICE void add_halves(float (&acc)[TILES][2][4], float* room, int warp) {
  const int own = Own::NUM / 2, lane = thread() % WARP;
  float* at = room + (warp % own * TILES * 8) * WARP + lane;
  if (warp >= own)
#pragma unroll
    for (int i = 0; i < TILES * 8; i++) at[i * WARP] = acc[i / 8][i / 4 % 2][i % 4];
  wait_for_all();
  if (warp < own)
#pragma unroll
    for (int i = 0; i < TILES * 8; i++) acc[i / 8][i / 4 % 2][i % 4] += at[i * WARP];
}

// Sums over lanes: 2 * HALF values of each, of which each gets that with the number of the lane's bits from MASK on.
template <int HALF, int MASK, int NUM>
DEVICE void scatter_sums(float (&value)[NUM]) {
  const bool upper = thread() & MASK;
#pragma unroll
  for (int i = 0; i < HALF; i++) {
    const float keep = upper ? value[i + HALF] : value[i], give = upper ? value[i] : value[i + HALF];
    value[i] = keep + from_lane_xor(give, MASK);
  }
  if constexpr (HALF > 1) scatter_sums<HALF / 2, MASK / 2>(value);
}

// Sums over shares, rows of 2 * CHANNELS, by all threads: room[0][...], and of squared differences from the first row
// (`SQUARES`): room[1][...].
template <int CHANNELS, int THREADS, bool SQUARES>
struct Shares {
  static constexpr int QUADS = CHANNELS / 2, ROWS = THREADS / QUADS, WARPS = THREADS / WARP;
  static constexpr int FLOATS = WARPS * 2 * 2 * CHANNELS;
  struct alignas(16) Quad { float value[4]; };

  static DEVICE void add_up(const float* shares, int num, float* room) {
    const int quad = thread() % QUADS;
    const Quad* column = reinterpret_cast<const Quad*>(shares) + quad;
    float sum[4] = {}, squares[4] = {};
    Quad pivot = {};
    if (SQUARES) pivot = *column;
#pragma unroll 4
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
        sum[i] += from_lane_xor(sum[i], mask);
        if (SQUARES) squares[i] += from_lane_xor(squares[i], mask);
      }
    if (thread() % WARP < QUADS) {
      float* to = room + thread() / WARP * (2 * 2 * CHANNELS) + quad * 4;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        to[i] = sum[i];
        if (SQUARES) to[2 * CHANNELS + i] = squares[i];
      }
    }
  }
  // After all threads have waited.
  static DEVICE float total(const float* room, int which, int i) {
    float total = 0;
    for (int warp = 0; warp < WARPS; warp++) total += room[(warp * 2 + which) * (2 * CHANNELS) + i];
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
      copy_begin(at, weight + i);
  }
}

constexpr int WEIGHT_BYTES = 9 * (K / 8) * WEIGHT_ROW * 16;
constexpr int STAGE_PLANE = TILES * TILE + 4;  // octets: of a warp's result, two planes; their banks differ
constexpr int STAGE_BYTES = 2 * STAGE_PLANE * 16;

// ---------------------------------------------------------------------------------------------------------------------

using ForwardWarps = Warps<N, SIDE>;
using ForwardMaps = Maps<K, SOURCE, 1>;

// What the norm of some maps needs, for the threads of a program.
template <int CHANNELS, int LENGTH, int THREADS>
struct Norm {
  using Whole = Maps<CHANNELS, LENGTH, 0>;
  using Sums = Shares<CHANNELS, THREADS, true>;
  static constexpr int NUM = Whole::COUNT / THREADS;  // octets of a thread, all of the same channels
  static constexpr int FLOATS = 2 * CHANNELS;         // of `factors`: what maps are multiplied by, and what is added

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

  // From shares, or without any from the running statistics. All threads wait inside, and once more after it.
  static DEVICE void prepare(const float* shares, int num_shares, int count, const float* scale, const float* shift,
                             float* running_mean, float* running_var, float* kept, float eps, float momentum,
                             float* room, float* factors) {
    if (num_shares) Sums::add_up(shares, num_shares, room);
    wait_for_all();
    const int k = thread();
    if (k >= CHANNELS) return;
    float mean, var;
    if (num_shares) {
      const float total = Sums::total(room, 0, k), off = total / num_shares;
      mean = shares[k] + off;
      float between = Sums::total(room, 1, k) - total * off;  // of the shares' means
      between = between < 0 ? 0 : between;
      const float within = Sums::total(room, 0, CHANNELS + k) + shares[CHANNELS + k] * num_shares;
      const float pixels = static_cast<float>(num_shares) * count;
      var = (within + count * between) / pixels;
      if (program() == 0) {
        running_mean[k] += momentum * (mean - running_mean[k]);
        running_var[k] += momentum * (var * (pixels / (pixels - 1)) - running_var[k]);
      }
    } else {
      mean = running_mean[k];
      var = running_var[k];
    }
    const float rstd = 1 / root(var + eps), factor = rstd * scale[k], offset = shift[k] - mean * factor;
    factors[k] = factor;
    factors[CHANNELS + k] = offset;
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
constexpr int FORWARD_BYTES = ForwardMaps::BYTES + WEIGHT_BYTES + ForwardWarps::NUM * STAGE_BYTES +
                              (FORWARD_FLOATS + ForwardNorm::FLOATS) * 4;

// source = ReLU(norm(below) + add), and maps = its convolution. Of the first layer the source are the images, `below`.
//
//   below, below_shares     what the layer below made, (images, SOURCE, SOURCE, K); `num_shares` of `count` pixels each:
//                           [2][K], mean and sum of squared differences from it; none: by the running statistics
//   add                     what its shortcut begins with, or null: of K channels, or of K / 2 and maps twice as long and
//                           wide, whose every second pixel and row goes to channels from `pad` on
//   kept                    becomes [4][K]: mean, one over the standard deviation, what maps are multiplied by and what is
//                           then added
//   shares                  become those of `maps`, one a program
//   images                  of a program
KERNEL(ForwardWarps::THREADS)
forward_layer(const Octet* below, const float* below_shares, const Octet* add, const float* scale, const float* shift,
              float* running_mean, float* running_var, Octet* source, float* kept, const Octet* weight, Octet* maps,
              float* shares, int num_shares, int count, int images, int add_channels, int pad, float eps,
              float momentum) {
  using Own = ForwardWarps;
  using Source = ForwardMaps;
  Octet* const window = reinterpret_cast<Octet*>(shared_memory());
  Octet* const weights = window + Source::BYTES / 16;
  Octet* const stages = weights + WEIGHT_BYTES / 16;
  float* const room = reinterpret_cast<float*>(stages + Own::NUM * STAGE_BYTES / 16);
  float* const factors = room + FORWARD_FLOATS;

  const int warp = thread() / WARP, lane = thread() % WARP;
  const int tile_warp = warp % (Own::GROUPS * Own::COLUMNS), part = warp / (Own::GROUPS * Own::COLUMNS);
  const int column = tile_warp % Own::COLUMNS, group = tile_warp / Own::COLUMNS;
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
        ForwardNorm::prepare(below_shares, num_shares, count, scale, shift, running_mean, running_var, kept, eps,
                             momentum, room, factors);
        wait_for_all();
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
    copies_end();
    wait_for_all();

    float acc[TILES][2][4];
    constexpr int STEPS = K / TILE / Own::SPLIT;
    convolve<SIDE, false, Source>(acc, window, weights, group, column, part * STEPS, (part + 1) * STEPS);
    if constexpr (Own::SPLIT > 1) {
      add_halves<Own>(acc, room, warp);
      wait_for_all();
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
              if (tile == 0 && run == 0) pivot[half * 2 + e] = from_lane(x[e], lane % 4);
              const float off = x[e] - pivot[half * 2 + e];
              sums[half * 2 + e] += off;
              sums[4 + half * 2 + e] += off * off;
            }
          }
      scatter_sums<4, 16>(sums);
      const int of = lane / 4 % 4;  // lanes below 16 have sums, the others those of squares
      const float squares = from_lane_xor(sums[0], 16), off = sums[0] / (TILES * TILE);
      if (lane < 16) {
        float* to = room + group * 2 * N + column * TILE + of / 2 * 8 + lane % 4 * 2 + of % 2;
        to[0] = (of == 0 ? pivot[0] : of == 1 ? pivot[1] : of == 2 ? pivot[2] : pivot[3]) + off;
        to[N] = squares - sums[0] * off;
      }
      wait_for_warp();
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const Place at = place<SIDE, false>(group, tile, lane / 2);
        maps[((image * SIDE + at.row) * SIDE + at.column) * (N / 8) + column * 2 + lane % 2] =
            stage[lane % 2 * STAGE_PLANE + tile * TILE + lane / 2];
      }
    }
    wait_for_all();
    if (thread() < N) {  // images so far and this one, groups of 64 pixels each: Chan, Golub and LeVeque 1979
      float mean = 0, squares = 0;
      for (int g = 0; g < Own::GROUPS; g++) mean += room[g * 2 * N + thread()];
      mean /= Own::GROUPS;
      for (int g = 0; g < Own::GROUPS; g++) {
        const float off = room[g * 2 * N + thread()] - mean;
        squares += room[(g * 2 + 1) * N + thread()] + TILES * TILE * off * off;
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

// What `forward_layer` begins with, for the last layer's maps, (images, SIDE, SIDE, N).
KERNEL(ForwardWarps::THREADS)
norm_forward(const Octet* maps, const float* maps_shares, const Octet* add, const float* scale, const float* shift,
             float* running_mean, float* running_var, Octet* result, float* kept, int num_shares, int count, int images,
             int add_channels, int pad, float eps, float momentum) {
  using Own = Norm<N, SIDE, ForwardWarps::THREADS>;
  float* const room = reinterpret_cast<float*>(shared_memory());
  wait_for_launch_before();
  for (int i = 0; i < images; i++) {
    Own norm = {maps, add, program() * images + i, add_channels, pad};
    norm.load();
    if (i == 0) {
      Own::prepare(maps_shares, num_shares, count, scale, shift, running_mean, running_var, kept, eps, momentum, room,
                   room + Own::Sums::FLOATS);
      wait_for_all();
    }
    const int octet = thread() % Own::Whole::OCTETS;
    const Eight factor = eight(room + Own::Sums::FLOATS, octet), offset = eight(room + Own::Sums::FLOATS + N, octet);
#pragma unroll
    for (int j = 0; j < Own::NUM; j++)
      result[norm.image * Own::Whole::COUNT + norm.at(j)] = norm.result(j, factor, offset);
  }
}
constexpr int NORM_BYTES =
    (Norm<N, SIDE, ForwardWarps::THREADS>::Sums::FLOATS + Norm<N, SIDE, ForwardWarps::THREADS>::FLOATS) * 4;

// ---------------------------------------------------------------------------------------------------------------------

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

  // All threads wait inside, and once more after it.
  static DEVICE void prepare(const float* shares, int num_shares, int count, const float* kept, float* grad_shift,
                             float* grad_scale, float* room, float* factors) {
    Sums::add_up(shares, num_shares, room);
    wait_for_all();
    const int n = thread();
    if (n >= CHANNELS) return;
    const float sum = Sums::total(room, 0, n), product = Sums::total(room, 0, CHANNELS + n);
    const float mean = kept[n], rstd = kept[CHANNELS + n], factor = kept[2 * CHANNELS + n];
    const float by_maps = -factor * rstd * (product / count);
    factors[n] = factor;
    factors[CHANNELS + n] = by_maps;
    factors[2 * CHANNELS + n] = -factor * (sum / count) - by_maps * mean;
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
constexpr int BACKWARD_BYTES = BackwardMaps::BYTES + WEIGHT_BYTES + BackwardWarps::NUM * STAGE_BYTES +
                               (BACKWARD_FLOATS + BackwardNorm::FLOATS) * 4;

// Shares of the gradients of shift and scale of the last layer's norm, [2][N] a program; `masked` becomes the gradient
// of its result, `out`, zero where ReLU was.
KERNEL(BackwardWarps::THREADS)
norm_sums(const Octet* grad, const Octet* maps, const Octet* out, const float* kept, Octet* masked, float* shares,
          int images) {
  using Whole = Maps<N, SIDE, 0>;
  constexpr int WARPS = BackwardWarps::NUM, OCTETS = Whole::OCTETS;
  float* const room = reinterpret_cast<float*>(shared_memory());  // [warps][2][N]
  const int octet = thread() % OCTETS, warp = thread() / WARP;
  float sums[16] = {};  // of 8 channels; then of products
  wait_for_launch_before();
  for (int at = thread(); at < images * Whole::COUNT; at += BackwardWarps::THREADS) {
    const int place = program() * images * Whole::COUNT + at;
    const Octet value = grad[place], was = maps[place], result = out[place];
    float own[8];
#pragma unroll
    for (int c = 0; c < 8; c++) own[c] = channel(result, c) > 0 ? channel(value, c) : 0;
    masked[place] = packed(own);
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const int n = octet * 8 + c;
      sums[c] += own[c];
      sums[8 + c] += own[c] * ((channel(was, c) - kept[n]) * kept[N + n]);
    }
  }
#pragma unroll
  for (int mask = WARP / 2; mask >= OCTETS; mask /= 2)
#pragma unroll
    for (int c = 0; c < 16; c++) sums[c] += from_lane_xor(sums[c], mask);
  if (thread() % WARP < OCTETS)
#pragma unroll
    for (int c = 0; c < 16; c++) room[(warp * 2 + c / 8) * N + octet * 8 + c % 8] = sums[c];
  wait_for_all();
  if (thread() < 2 * N) {
    float total = 0;
    for (int w = 0; w < WARPS; w++) total += room[w * 2 * N + thread()];
    shares[program() * 2 * N + thread()] = total;
  }
}
constexpr int SUMS_BYTES = BackwardWarps::NUM * 2 * N * 4;

// What `backward_layer` begins with, for the first layer, whose source needs no gradient.
KERNEL(BackwardWarps::THREADS)
norm_backward(const Octet* grad, const Octet* maps, const float* kept, const float* grad_shares, float* grad_shift,
              float* grad_scale, Octet* grad_maps, int num_shares, int count, int images) {
  float* const room = reinterpret_cast<float*>(shared_memory());
  wait_for_launch_before();
  for (int i = 0; i < images; i++) {
    BackwardNorm norm = {grad, maps, program() * images + i};
    norm.load();
    if (i == 0) {
      BackwardNorm::prepare(grad_shares, num_shares, count, kept, grad_shift, grad_scale, room,
                            room + BackwardNorm::Sums::FLOATS);
      wait_for_all();
    }
    const float* const factors = room + BackwardNorm::Sums::FLOATS;
    const int octet = thread() % BackwardNorm::Whole::OCTETS;
    const Eight factor = eight(factors, octet), by_maps = eight(factors + N, octet), offset = eight(factors + 2 * N, octet);
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
//   count                   pixels of the batch
KERNEL(BackwardWarps::THREADS)
backward_layer(const Octet* grad, const Octet* maps, const float* kept, const float* grad_shares, float* grad_shift,
               float* grad_scale, Octet* grad_maps, const Octet* weight, const Octet* below, const float* below_kept,
               const Octet* source, const Octet* over, Octet* grad_source, float* shares, int num_shares, int count,
               int images, int pad) {
  using Own = BackwardWarps;
  using Target = BackwardMaps;
  Octet* const window = reinterpret_cast<Octet*>(shared_memory());
  Octet* const weights = window + Target::BYTES / 16;
  Octet* const stages = weights + WEIGHT_BYTES / 16;
  float* const room = reinterpret_cast<float*>(stages + Own::NUM * STAGE_BYTES / 16);
  float* const factors = room + BACKWARD_FLOATS;

  const int warp = thread() / WARP, lane = thread() % WARP;
  const int tile_warp = warp % (Own::GROUPS * Own::COLUMNS), part = warp / (Own::GROUPS * Own::COLUMNS);
  const int column = tile_warp % Own::COLUMNS, group = tile_warp / Own::COLUMNS;
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
      BackwardNorm::prepare(grad_shares, num_shares, count, kept, grad_shift, grad_scale, room, factors);
      wait_for_all();
    }
    const int octet = thread() % Target::OCTETS;
    const Eight factor = eight(factors, octet), by_maps = eight(factors + N, octet), offset = eight(factors + 2 * N, octet);
#pragma unroll
    for (int j = 0; j < BackwardNorm::NUM; j++) {
      const Octet whole = norm.result(j, factor, by_maps, offset);
      window[Target::of(norm.at(j))] = whole;
      grad_maps[image * Target::COUNT + norm.at(j)] = whole;
    }
    copies_end();
    wait_for_all();

    // What the end needs is under way while the products are made.
    Octet under[TILES], result[TILES], across[TILES];
    int at[TILES];
    if (part == 0)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const Place there = place<SOURCE, STRIDE == 2>(group, tile, lane / 2);
        at[tile] = ((image * SOURCE + there.row) * SOURCE + there.column) * (K / 8) + own;
        under[tile] = below[at[tile]];
        if (source) result[tile] = source[at[tile]];
        across[tile] = zeros();
        if (over) {
          if (N == K)
            across[tile] = over[at[tile]];
          else if (there.row % 2 == 0 && there.column % 2 == 0)
            across[tile] = over[((image * SOURCE + there.row) / 2 * SIDE + there.column / 2) * (N / 8) + own + pad / 8];
        }
      }
    float acc[TILES][2][4];
    constexpr int STEPS = N / TILE / Own::SPLIT;
    convolve<SOURCE, true, Target>(acc, window, weights, group, column, part * STEPS, (part + 1) * STEPS);
    if constexpr (Own::SPLIT > 1) {
      add_halves<Own>(acc, room, warp);
      wait_for_all();
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
      wait_for_warp();
      const Eight mean = eight(below_kept, own), rstd = eight(below_kept + K, own);
      const Eight factor = eight(below_kept + 2 * K, own), offset = eight(below_kept + 3 * K, own);
      float sums[16] = {};  // of 8 channels; then of products
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const Octet made = stage[lane % 2 * STAGE_PLANE + tile * TILE + lane / 2];
        float gradient[8];
#pragma unroll
        for (int c = 0; c < 8; c++) {
          const float was =
              source ? channel(result[tile], c) : channel(under[tile], c) * factor.value[c] + offset.value[c];
          gradient[c] = was > 0 ? channel(made, c) + channel(across[tile], c) : 0;
        }
        const Octet whole = packed(gradient);
        grad_source[at[tile]] = whole;
#pragma unroll
        for (int c = 0; c < 8; c++) {
          sums[c] += channel(whole, c);
          sums[8 + c] += channel(whole, c) * (channel(under[tile], c) - mean.value[c]);
        }
      }
#pragma unroll
      for (int c = 0; c < 8; c++) sums[8 + c] *= rstd.value[c];
      scatter_sums<8, 16>(sums);
      const int of = lane / 2;  // which 8, and channel
      room[(group * 2 + of / 8) * K + own * 8 + of % 8] = sums[0];
    }
    wait_for_all();
    for (int j = thread(); j < 2 * K; j += Own::THREADS)
      for (int g = 0; g < Own::GROUPS; g++) sum_so_far += room[g * 2 * K + j];
  }
  static_assert(2 * K <= Own::THREADS, "a thread has one sum");
  if (thread() < 2 * K) shares[program() * 2 * K + thread()] = sum_so_far;
}

// ---------------------------------------------------------------------------------------------------------------------

constexpr int LAYERS = 48;  // of a launch, at most
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
      copy_begin(to + GradMaps::of(i), grad + image * GradMaps::COUNT + i);
    to += GradMaps::BYTES / 16;
    for (int i = thread(); i < SourceMaps::COUNT; i += WEIGHT_THREADS) {
      Octet* const at = to + SourceMaps::of(i);
      if (FIRST)
        *at = i % SourceMaps::OCTETS ? zeros() : of_image(source, image * SourceMaps::PIXELS + i / SourceMaps::OCTETS);
      else
        copy_begin(at, source + image * SourceMaps::COUNT + i);
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
    copies_end();
    wait_for_all();
    if (image + 1 < end) fetch(image + 1, memory + (image + 1 - begin) % 2 * (PAIR_BYTES / 16));
    u32 a[GROUP_TILES][4];
#pragma unroll
    for (int t = 0; t < GROUP_TILES; t++)
      matrices_transposed(a[t], own + GradMaps::at(out * 2 + first, 0, (group * GROUP_TILES + t) * TILE + second * 8 + row_of));
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
            matrices_transposed(b, window + SourceMaps::at(octet, group * GROUP_ROWS + r, part * TILE + dx + first * 8 + row_of));
#pragma unroll
            for (int dy = 0; dy < 3; dy++) {
              const int row = r - dy;
              if (row < 0 || row >= GROUP_ROWS) continue;
              const u32(&g)[4] = a[row * ACROSS + part];
#pragma unroll
              for (int half = 0; half < 2; half++)
                multiply_add(acc[dy * 3 + dx][half], g[0], g[1], g[2], g[3], b[2 * half], b[2 * half + 1]);
            }
          }
    } else if (STRIDE == 1) {
#pragma unroll
      for (int dx = 0; dx < 3; dx++) {
        u32 b[5][4];  // of two rows each
#pragma unroll
        for (int r = 0; r < 5; r++) matrices_transposed(b[r], window + SourceMaps::at(octet, 2 * r + first, dx + row_of));
#pragma unroll
        for (int dy = 0; dy < 3; dy++)
#pragma unroll
          for (int t = 0; t < GROUP_TILES; t++) {
            const int r = t + dy / 2, odd = dy % 2, next = r + odd;
#pragma unroll
            for (int half = 0; half < 2; half++)
              multiply_add(acc[dy * 3 + dx][half], a[t][0], a[t][1], a[t][2], a[t][3], b[r][2 * half + odd],
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
          matrices_transposed(b, window + SourceMaps::at(octet, pixel / SIDE * 2 + tap / 3, pixel % SIDE * 2 + tap % 3));
#pragma unroll
          for (int half = 0; half < 2; half++)
            multiply_add(acc[tap][half], a[t][0], a[t][1], a[t][2], a[t][3], b[2 * half], b[2 * half + 1]);
        }
      }
    }
  }
  constexpr int THERE = FIRST ? IMAGE_CHANNELS : K;
  float* const share = layers.shares[which_layer()] + program() * (9 * THERE * N);
  float* const to = PIXEL_GROUPS > 1 ? reinterpret_cast<float*>(memory) + group * (9 * K * N) : share;
  if (PIXEL_GROUPS > 1) wait_for_all();
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
    wait_for_all();
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
constexpr int ADD_UP_THREADS = 256;
struct Row { int start, num_shares, size, first, place; };
KERNEL(ADD_UP_THREADS) add_up(const float* shares, const Row* table, float* result) {
  const Row row = table[program()];
  wait_for_launch_before();
  const int at = row.first + thread();
  if (at >= row.size) return;
  float total = 0;
#pragma unroll 8
  for (int share = 0; share < row.num_shares; share++) total += shares[row.start + share * row.size + at];
  result[row.place + at] = total;
}

// Threads and bytes of shared memory, in the order of `gpu_layers.NAMES`.
CONSTANT int sizes[14] = {
    ForwardWarps::THREADS,  FORWARD_BYTES, BackwardWarps::THREADS, BACKWARD_BYTES,  WEIGHT_THREADS, WEIGHTS_BYTES,
    ForwardWarps::THREADS,  NORM_BYTES,    BackwardWarps::THREADS, NORM_GRAD_BYTES, BackwardWarps::THREADS, SUMS_BYTES,
    ADD_UP_THREADS, 0,
};
