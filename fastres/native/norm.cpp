// Batch norm, the addition of a shortcut and ReLU as one pass over memory each way (and one before it for the sums),
// where torch makes three; for CPUs. `kernels.py` builds it, `ops.py` calls it.
//
// Maps are channels last, float or bfloat16, seen as a table of max(channels, 64) columns, which a channel has one or
// several of. A tile is 64 columns of 64 rows: few enough for the first cache, and the same whatever the threads, so
// that results do not depend on their number. All arithmetic is in float; tiles are joined in double.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t COLUMNS = 64, ROWS = 64;  // of a tile
constexpr int VECTORS = COLUMNS / LANES;

Floats relu(Floats values) { return where(~(values < 0), values); }  // NaN stays NaN, as in torch

struct Table {
  int64_t channels, columns, rows, tiles;  // tiles: one below the other
  Table(int64_t numel, int64_t channels)
      : channels(channels),
        columns(std::max(channels, COLUMNS)),
        rows(numel / columns),
        tiles((rows + ROWS - 1) / ROWS) {}
  int64_t values_a_channel() const { return rows * (columns / channels); }
};

// A tile: its place, and where its share of the sums goes.
struct Tile {
  int64_t begin, end, step, column, partial;  // numbers of the table from begin to end, a row every step
  float rows;
  Tile(const Table& table, int64_t i) {
    const int64_t across = table.columns / COLUMNS, top = i / across * ROWS;
    const int64_t height = std::min(ROWS, table.rows - top);
    column = i % across * COLUMNS;
    begin = top * table.columns + column;
    end = begin + height * table.columns;
    step = table.columns;
    partial = i / across * table.columns + column;
    rows = height;
  }
};

// A value for each channel, repeated so that there is one for each column.
struct PerColumn {
  std::vector<float> values;
  explicit PerColumn(const Table& table) : values(table.columns) {}
  PerColumn(const Table& table, const float* of_channels) : values(table.columns) {
    for (int64_t c = 0; c < table.channels; c++) set(table, c, of_channels[c]);
  }
  void set(const Table& table, int64_t channel, float value) {
    for (int64_t column = channel; column < table.columns; column += table.channels) values[column] = value;
  }
};

// A row of a tile.
struct Row {
  Floats of[VECTORS];
  Row() : of{} {}
  explicit Row(const float* from) {
    for (int v = 0; v < VECTORS; v++) of[v] = load(from + v * LANES);
  }
  void write(float* to) const {
    for (int v = 0; v < VECTORS; v++) store(to + v * LANES, of[v]);
  }
};

// Mean and squared deviations of each tile's columns; by Chan, Golub and LeVeque, 1983, they are joined.
template <class T>
void moments(const T* x, const Tile& tile, float* means, float* squares) {
  Row mean, square;
  for (int64_t k = tile.begin; k < tile.end; k += tile.step)
    for (int v = 0; v < VECTORS; v++) mean.of[v] += load(x + k + v * LANES);
  for (int v = 0; v < VECTORS; v++) mean.of[v] /= tile.rows;
  for (int64_t k = tile.begin; k < tile.end; k += tile.step)
    for (int v = 0; v < VECTORS; v++) {
      const Floats off = load(x + k + v * LANES) - mean.of[v];
      square.of[v] += off * off;
    }
  mean.write(means + tile.partial);
  square.write(squares + tile.partial);
}

// Of every channel, from those of the tiles. `columns` is room for two numbers a column.
void join(const Table& table, const std::vector<float>& means, const std::vector<float>& squares, double* mean,
          double* square, double* columns) {
  const int64_t n = table.columns;
  double *all = columns, *off = columns + n;
  std::fill_n(columns, 2 * n, 0.0);
  std::fill_n(mean, table.channels, 0.0);
  std::fill_n(square, table.channels, 0.0);
  const auto height = [&](int64_t i) { return (double)std::min(ROWS, table.rows - i * ROWS); };
  for (int64_t i = 0; i < table.tiles; i++)
    for (int64_t c = 0; c < n; c++) all[c] += height(i) * means[i * n + c];
  for (int64_t c = 0; c < n; c++) mean[c % table.channels] += all[c] / table.values_a_channel();
  for (int64_t c = 0; c < n; c++) all[c] = mean[c % table.channels];
  for (int64_t i = 0; i < table.tiles; i++)
    for (int64_t c = 0; c < n; c++) {
      const double away = means[i * n + c] - all[c];
      off[c] += squares[i * n + c] + height(i) * away * away;
    }
  for (int64_t c = 0; c < n; c++) square[c % table.channels] += off[c];
}

// y = relu((x - mean) * rstd * weight + bias + add). `kept`: mean, rstd, rstd * weight and bias of each channel, for
// `backward`. The mean goes off first: beside a large one less is lost of a small variance.
template <class T>
void forward(const T* x, const T* add, const float* weight, const float* bias, float* running_mean, float* running_var,
             T* y, float* kept, int64_t numel, int64_t channels, float eps, float momentum, int threads) {
  const Table table(numel, channels);
  const int64_t tiles = table.tiles * (table.columns / COLUMNS);
  std::vector<float> means(table.tiles * table.columns), squares(means.size());
  PerColumn mean(table), scale(table), shift(table);
  std::vector<double> exact(channels), square(channels), room(2 * table.columns);  // no memory is asked for by a thread
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; i++) moments(x, Tile(table, i), means.data(), squares.data());
#pragma omp single
    {
      join(table, means, squares, exact.data(), square.data(), room.data());
      const double count = table.values_a_channel();
      for (int64_t c = 0; c < channels; c++) {
        const float rstd = 1 / std::sqrt(square[c] / count + eps);
        const float values[] = {(float)exact[c], rstd, weight[c] * rstd, bias[c]};
        for (int k = 0; k < 4; k++) kept[k * channels + c] = values[k];
        mean.set(table, c, values[0]);
        scale.set(table, c, values[2]);
        shift.set(table, c, values[3]);
        running_mean[c] += momentum * (kept[c] - running_mean[c]);
        running_var[c] += momentum * ((float)(square[c] / (count - 1)) - running_var[c]);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; i++) {
      const Tile tile(table, i);
      const Row means(&mean.values[tile.column]), scales(&scale.values[tile.column]);
      const Row shifts(&shift.values[tile.column]);
      for (int64_t k = tile.begin; k < tile.end; k += tile.step)
        for (int v = 0; v < VECTORS; v++) {
          const int64_t at = k + v * LANES;
          Floats out = (load(x + at) - means.of[v]) * scales.of[v] + shifts.of[v];
          if (add) out += load(add + at);
          store(y + at, relu(out));
        }
    }
  }
}

// Gradients of all that went in. `y` and `grad_add` are null where nothing was added: what ReLU let through is then
// seen in x, which is read anyway.
template <class T>
void backward(const T* grad, const T* x, const T* y, const float* kept, T* grad_x, T* grad_add, float* grad_weight,
              float* grad_bias, int64_t numel, int64_t channels, int threads) {
  const Table table(numel, channels);
  const int64_t tiles = table.tiles * (table.columns / COLUMNS), n = table.columns;
  std::vector<float> sums(table.tiles * n), dots(sums.size());
  const float *rstd = kept + channels, *scaled = kept + 2 * channels;
  const PerColumn mean(table, kept), scale(table, scaled), shift(table, kept + 3 * channels);
  PerColumn slope(table), offset(table);
  std::vector<double> sum_of(n), dot_of(n);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; i++) {
      const Tile tile(table, i);
      const Row means(&mean.values[tile.column]), scales(&scale.values[tile.column]);
      const Row shifts(&shift.values[tile.column]);
      Row sum, dot;
      for (int64_t k = tile.begin; k < tile.end; k += tile.step)
        for (int v = 0; v < VECTORS; v++) {
          const int64_t at = k + v * LANES;
          const Floats off = load(x + at) - means.of[v];
          const Floats out = y ? load(y + at) : off * scales.of[v] + shifts.of[v];
          const Floats passed = where(out > 0, load(grad + at));
          if (grad_add) store(grad_add + at, passed);
          sum.of[v] += passed;
          dot.of[v] += passed * off;
        }
      sum.write(&sums[tile.partial]);
      dot.write(&dots[tile.partial]);
    }
#pragma omp single
    {
      double *sum = sum_of.data(), *dot = dot_of.data();
      for (int64_t i = 0; i < table.tiles; i++)
        for (int64_t c = 0; c < n; c++) sum[c] += sums[i * n + c], dot[c] += dots[i * n + c];
      for (int64_t c = channels; c < n; c++) sum[c % channels] += sum[c], dot[c % channels] += dot[c];
      const double count = table.values_a_channel();
      for (int64_t c = 0; c < channels; c++) {
        grad_bias[c] = sum[c];
        grad_weight[c] = dot[c] * rstd[c];
        slope.set(table, c, -scaled[c] * (double)rstd[c] * rstd[c] * dot[c] / count);
        offset.set(table, c, -scaled[c] * sum[c] / count);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; i++) {
      const Tile tile(table, i);
      const Row means(&mean.values[tile.column]), scales(&scale.values[tile.column]);
      const Row shifts(&shift.values[tile.column]);
      const Row slopes(&slope.values[tile.column]), offsets(&offset.values[tile.column]);
      for (int64_t k = tile.begin; k < tile.end; k += tile.step)
        for (int v = 0; v < VECTORS; v++) {
          const int64_t at = k + v * LANES;
          const Floats off = load(x + at) - means.of[v];
          const Floats passed =
              grad_add ? load(grad_add + at) : where(off * scales.of[v] + shifts.of[v] > 0, load(grad + at));
          store(grad_x + at, passed * scales.of[v] + off * slopes.of[v] + offsets.of[v]);
        }
    }
  }
}

}  // namespace

// Each gives 0, or 1 where memory ran out.
#define FOR(T)                                                                                                        \
  extern "C" int norm_forward_##T(const T* x, const T* add, const float* weight, const float* bias,                   \
                                  float* running_mean, float* running_var, T* y, float* kept, int64_t numel,          \
                                  int64_t channels, float eps, float momentum, int threads) try {                     \
    forward(x, add, weight, bias, running_mean, running_var, y, kept, numel, channels, eps, momentum, threads);       \
    return 0;                                                                                                         \
  } catch (const std::bad_alloc&) {                                                                                   \
    return 1;                                                                                                         \
  }                                                                                                                   \
  extern "C" int norm_backward_##T(const T* grad, const T* x, const T* y, const float* kept, T* grad_x, T* grad_add,  \
                                   float* grad_weight, float* grad_bias, int64_t numel, int64_t channels,             \
                                   int threads) try {                                                                 \
    backward(grad, x, y, kept, grad_x, grad_add, grad_weight, grad_bias, numel, channels, threads);                   \
    return 0;                                                                                                         \
  } catch (const std::bad_alloc&) {                                                                                   \
    return 1;                                                                                                         \
  }

FOR(float)
FOR(bf16)
