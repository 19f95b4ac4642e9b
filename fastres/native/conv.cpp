// Gradient of the weights of a 3x3 convolution of stride 1 with padding 1, bfloat16 in and float out, for CPUs that
// multiply bfloat16 by AVX-512. `kernels.py` builds it, `ops.py` calls it.
//
// For each of the nine taps it is a matrix product, channels in x channels out, summed over all pixels. The instruction
// takes two pixels at once, which must lie side by side in a word: so a band of rows is first copied as pairs of
// pixels, both those that begin at even and those that begin at odd columns, since taps shift by one. Of 16 channels
// a band fits the first cache, where all taps find it. Sums over images are in 16 groups, for as many threads at most,
// and joined in one order whatever the threads.

#ifdef __AVX512BF16__

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t GROUPS = 16;  // of images
constexpr int64_t PAIRS = 128;  // of pixels in a band, about; several images where one has fewer
constexpr int64_t TAPS = 9, BLOCK = LANES * LANES;  // weights of a tap between 16 channels and 16

struct Shape {
  int64_t images, height, width, in, out;  // of the batch, the maps, and the channels
};

// Sizes of a band, in words, for 16 channels of one image. Odd pairs are one fewer a row: padding is at even columns.
struct Band {
  int64_t rows, images, even_row, odd_row, even, odd, grad;
  explicit Band(const Shape& shape) {
    const int64_t pairs = shape.width / 2;
    rows = std::min(shape.height, std::max<int64_t>(1, PAIRS / pairs));
    images = std::max<int64_t>(1, PAIRS / (pairs * shape.height));
    odd_row = pairs * LANES, even_row = odd_row + LANES;
    even = (rows + 2) * even_row, odd = (rows + 2) * odd_row, grad = rows * odd_row;
  }
};

// A row of `width` pixels, and a zero before and behind it, as pairs: words of 16 channels.
void pair_up(const bf16* row, int64_t width, int64_t channels, uint32_t* even, uint32_t* odd) {
  Words before = words(row);
  write(even, before << 16);
  for (int64_t x = 1; x < width; x += 2, even += LANES, odd += LANES) {
    const Words here = words(row + x * channels);
    write(odd, before | here << 16);
    before = x + 1 < width ? words(row + (x + 1) * channels) : Words{};
    write(even + LANES, here | before << 16);
  }
}

// The band's sums of one tap between 16 channels and 16, added to what is there.
void add_products(const uint32_t* x, int64_t x_row, int64_t x_image, const uint32_t* grad, const Band& band,
                  int64_t images, int64_t pairs, float* sums) {
  __m512 sum[LANES];
  for (int i = 0; i < LANES; i++) sum[i] = _mm512_loadu_ps(sums + i * LANES);
  for (int64_t image = 0; image < images; image++)
    for (int64_t y = 0; y < band.rows; y++) {
      const uint32_t* xs = x + image * x_image + y * x_row;
      const uint32_t* grads = grad + image * band.grad + y * band.odd_row;
#pragma GCC unroll 4
      for (int64_t pair = 0; pair < pairs; pair++, xs += LANES, grads += LANES) {
        const __m512bh of_out = (__m512bh)_mm512_loadu_si512(grads);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) sum[i] = _mm512_dpbf16_ps(sum[i], of_out, (__m512bh)_mm512_set1_epi32(xs[i]));
      }
    }
  for (int i = 0; i < LANES; i++) _mm512_storeu_ps(sums + i * LANES, sum[i]);
}

// Sums of a group of images: [block of channels out][of channels in][tap][channel in][channel out].
class Group {
 public:
  explicit Group(const Shape& shape)
      : shape(shape), band(shape), pairs(shape.width / 2), ins(shape.in / LANES), outs(shape.out / LANES) {
    const int64_t size = band.images * (ins * (band.even + band.odd) + outs * band.grad);
    buffer.reset((uint32_t*)std::aligned_alloc(64, size * sizeof(uint32_t)));
    if (!buffer) throw std::bad_alloc();
    even = buffer.get(), odd = even + ins * band.images * band.even, grads = odd + ins * band.images * band.odd;
  }

  void sum(const bf16* x, const bf16* grad, int64_t first, int64_t last, float* sums) {
    std::fill_n(sums, TAPS * shape.in * shape.out, 0.0f);
    for (int64_t image = first; image < last; image += band.images) {
      const int64_t images = std::min(band.images, last - image);
      for (int64_t y = 0; y < shape.height; y += band.rows) {
        copy(x, grad, image, images, y);
        multiply(x, grad, image, images, y, sums);
      }
    }
  }

 private:
  void copy(const bf16* x, const bf16* grad, int64_t image, int64_t images, int64_t top) {
    for (int64_t k = 0; k < images; k++) {
      const int64_t place = (image + k) * shape.height;
      for (int64_t y = 0; y < band.rows + 2; y++)
        for (int64_t c = 0; c < ins; c++) {
          uint32_t* evens = even + (c * band.images + k) * band.even + y * band.even_row;
          uint32_t* odds = odd + (c * band.images + k) * band.odd + y * band.odd_row;
          const int64_t row = top + y - 1;
          if (row < 0 || row >= shape.height) {
            std::fill_n(evens, band.even_row, 0);
            std::fill_n(odds, band.odd_row, 0);
          } else {
            pair_up(x + (place + row) * shape.width * shape.in + c * LANES, shape.width, shape.in, evens, odds);
          }
        }
      for (int64_t y = 0; y < std::min(band.rows, shape.height - top); y++)
        for (int64_t c = 0; c < outs; c++) {
          const bf16* row = grad + (place + top + y) * shape.width * shape.out + c * LANES;
          uint32_t* to = grads + (c * band.images + k) * band.grad + y * band.odd_row;
          for (int64_t pair = 0; pair < pairs; pair++, row += 2 * shape.out)
            write(to + pair * LANES, words(row) | words(row + shape.out) << 16);
        }
      for (int64_t c = 0, missing = top + band.rows - shape.height; missing > 0 && c < outs; c++)
        std::fill_n(grads + (c * band.images + k + 1) * band.grad - missing * band.odd_row, missing * band.odd_row, 0);
    }
  }

  void multiply(const bf16* x, const bf16* grad, int64_t image, int64_t images, int64_t top, float* sums) {
    // While this band is multiplied, the next one comes from memory, a part with each tap.
    const int64_t next = (top + band.rows < shape.height ? image * shape.height + top + band.rows
                                                         : (image + images) * shape.height) * shape.width;
    const int64_t calls = TAPS * ins * outs, pixels = images * band.rows * shape.width;
    const auto fetch = [&](const bf16* from, int64_t channels, int64_t call) {
      const char* start = (const char*)(from + next * channels);
      const int64_t bytes = pixels * channels * sizeof(bf16);
      for (int64_t k = bytes * call / calls / 64 * 64; k < bytes * (call + 1) / calls; k += 64)
        __builtin_prefetch(start + k);
    };
    int64_t call = 0;
    for (int64_t out = 0; out < outs; out++)
      for (int64_t in = 0; in < ins; in++)
        for (int64_t tap = 0; tap < TAPS; tap++, call++, sums += BLOCK) {
          fetch(x, shape.in, call);
          fetch(grad, shape.out, call);
          const int64_t down = tap / 3, right = tap % 3, place = in * band.images;
          const uint32_t* pairs_of_x = right == 1 ? odd + place * band.odd + down * band.odd_row
                                                  : even + place * band.even + down * band.even_row + right / 2 * LANES;
          add_products(pairs_of_x, right == 1 ? band.odd_row : band.even_row, right == 1 ? band.odd : band.even,
                       grads + out * band.images * band.grad, band, images, pairs, sums);
        }
  }

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  Shape shape;
  Band band;
  int64_t pairs, ins, outs;  // in a row; blocks of 16 channels
  std::unique_ptr<uint32_t, Free> buffer;
  uint32_t *even, *odd, *grads;
};

}  // namespace

// x: [image][row][column][channel in]; grad: the same with channels out; grad_weight: [channel out][tap][channel in].
// Channels are multiples of 16, the width is even. Gives 0, or 1 where memory ran out.
extern "C" int conv_weight_grad(const bf16* x, const bf16* grad, float* grad_weight, int64_t images, int64_t height,
                                int64_t width, int64_t in, int64_t out, int threads) try {
  const Shape shape{images, height, width, in, out};
  const int64_t size = TAPS * in * out, each = (images + GROUPS - 1) / GROUPS;
  const std::unique_ptr<float[]> sums(new float[GROUPS * size]);
  threads = std::min<int>(threads, GROUPS);
  std::vector<Group> groups;  // a thread's; no memory is asked for by a thread
  for (int k = 0; k < threads; k++) groups.emplace_back(shape);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < GROUPS; k++)
      groups[omp_get_thread_num()].sum(x, grad, std::min(images, k * each), std::min(images, (k + 1) * each),
                                       &sums[k * size]);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < size; i++) {
      float sum = 0;
      for (int64_t k = 0; k < GROUPS; k++) sum += sums[k * size + i];
      const int64_t block = i / (TAPS * BLOCK), tap = i / BLOCK % TAPS;
      const int64_t of_in = block % (in / LANES) * LANES + i / LANES % LANES;
      const int64_t of_out = block / (in / LANES) * LANES + i % LANES;
      grad_weight[(of_out * TAPS + tap) * in + of_in] = sum;
    }
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

#endif
