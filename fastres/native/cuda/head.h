// From the last convolution to the loss, and back.
#pragma once
#include "forward.h"

// Sums over all threads of a program of what each has of the 8 channels of octet `thread() % OCTETS`; scratch:
// [warps][8 * OCTETS]. `total` gives them after a `sync_block`.
template <int OCTETS, int WARPS>
struct ChannelSums {
  static constexpr int FLOATS = WARPS * 8 * OCTETS;

  static DEVICE void add_up(const float* value, float* scratch) {
#pragma unroll
    for (int c = 0; c < 8; c++) {
      float sum = value[c];
#pragma unroll
      for (int mask = WARP / 2; mask >= OCTETS; mask /= 2) sum += shuffle_xor(sum, mask);
      if (thread() % WARP < OCTETS) scratch[thread() / WARP * 8 * OCTETS + thread() % OCTETS * 8 + c] = sum;
    }
  }
  static DEVICE float total(const float* scratch, int i) {
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) total += scratch[warp * 8 * OCTETS + i];
    return total;
  }
};

// All that comes after the last convolution, both ways: norm, shortcut and ReLU, the mean over the pixels, logits,
// softmax and cross-entropy, and the gradients of all that.
//
//   maps, maps_shares       the last convolution's result, (images, SIDE, SIDE, N), and shares of its statistics
//   add ... kept, momentum  as of `forward_layer`
//   weight, bias            of the last layer, (num_classes, N) and (num_classes)
//   labels                  of the batch's images
//   grad                    becomes the gradient of what the norm gave, zero where ReLU was
//   shares                  become shares of the gradients of the norm's shift and scale, [2][N] a program
//   pooled, grad_logits     become the means (batch, N), and the gradients of the logits, (batch, num_classes)
//   losses, wrong           become the cross-entropy of each image, and whether its answer is wrong
KERNEL(ForwardWarps::THREADS)
head(const Octet* maps, const float* maps_shares, const Octet* add, const float* scale, const float* shift,
     float* running_mean, float* running_var, float* kept, const float* weight, const float* bias,
     const long long* labels, Octet* grad, float* shares, float* pooled, float* grad_logits, float* losses, int* wrong,
     int num_shares, int share_pixels, int images, int add_channels, int pad, float eps, float momentum,
     int num_classes) {
  using Own = Norm<N, SIDE, ForwardWarps::THREADS>;
  using Sums = ChannelSums<Own::Whole::OCTETS, ForwardWarps::NUM>;
  constexpr int OCTETS = Own::Whole::OCTETS, WARPS = ForwardWarps::NUM;
  float* const scratch = reinterpret_cast<float*>(shared_memory());
  float* const factors = scratch + at_least(Own::Sums::FLOATS, 2 * Sums::FLOATS);
  float* const means = factors + Own::FLOATS;  // of the channels, then their gradients
  float* const logits = means + N;             // then their gradients
  float* const last = logits + CLASSES;        // the weight
  const int octet = thread() % OCTETS, warp = thread() / WARP, lane = thread() % WARP;
  const int batch = num_programs() * images;
  float sums[16] = {};  // of the gradient in 8 channels; then of its products with normed maps
  for (int i = thread(); i < num_classes * N; i += ForwardWarps::THREADS) last[i] = weight[i];
  wait_for_launch_before();
  for (int i = 0; i < images; i++) {
    const int image = program() * images + i;
    Own norm = {maps, add, image, add_channels, pad};
    norm.load();
    if (i == 0)
      Own::prepare(maps_shares, num_shares, share_pixels, scale, shift, running_mean, running_var, kept, eps, momentum,
                   scratch, factors);
    sync_block();
    const Eight factor = eight(factors, octet), offset = eight(factors + N, octet);
    Octet result[Own::NUM];
    float sum[8] = {};
#pragma unroll
    for (int j = 0; j < Own::NUM; j++) {
      result[j] = norm.result(j, factor, offset);
#pragma unroll
      for (int c = 0; c < 8; c++) sum[c] += channel(result[j], c);
    }
    Sums::add_up(sum, scratch);
    sync_block();
    if (thread() < N) {
      const float mean = Sums::total(scratch, thread()) / (SIDE * SIDE);
      means[thread()] = mean;
      pooled[image * N + thread()] = mean;
    }
    sync_block();
    for (int c = warp; c < num_classes; c += WARPS) {
      float logit = 0;
      for (int k = lane; k < N; k += WARP) logit += means[k] * last[c * N + k];
#pragma unroll
      for (int mask = WARP / 2; mask; mask /= 2) logit += shuffle_xor(logit, mask);
      if (lane == 0) logits[c] = logit + bias[c];
    }
    sync_block();
    const int label = static_cast<int>(labels[image]), own_class = thread();
    float most = logits[0], total = 0;
    int answer = 0;
    for (int c = 1; c < num_classes; c++)
      if (logits[c] > most || (logits[c] != logits[c] && most == most)) {  // NaN is most, as in torch
        most = logits[c];
        answer = c;
      }
    for (int c = 0; c < num_classes; c++) total += exponential(logits[c] - most);
    const float own_logit = own_class < num_classes ? logits[own_class] : 0;
    if (thread() == 0) {
      losses[image] = logarithm(total) + most - logits[label];
      wrong[image] = answer != label;
    }
    sync_block();
    if (own_class < num_classes) {
      const float gradient = (exponential(own_logit - most) / total - (own_class == label)) / batch;
      logits[own_class] = gradient;
      grad_logits[image * num_classes + own_class] = gradient;
    }
    sync_block();
    if (thread() < N) {
      float gradient = 0;
      for (int c = 0; c < num_classes; c++) gradient += logits[c] * last[c * N + thread()];
      means[thread()] = gradient / (SIDE * SIDE);
    }
    sync_block();
    const Eight gradient = eight(means, octet), mean = eight(factors + 2 * N, octet);
#pragma unroll
    for (int j = 0; j < Own::NUM; j++) {
      float own[8];
#pragma unroll
      for (int c = 0; c < 8; c++) own[c] = channel(result[j], c) > 0 ? gradient.value[c] : 0;
      const Octet whole = packed(own);
      grad[image * Own::Whole::COUNT + norm.at(j)] = whole;
#pragma unroll
      for (int c = 0; c < 8; c++) {
        sums[c] += channel(whole, c);
        sums[8 + c] += channel(whole, c) * (channel(norm.value[j], c) - mean.value[c]);
      }
    }
  }
  Sums::add_up(sums, scratch);
  Sums::add_up(sums + 8, scratch + Sums::FLOATS);
  sync_block();
  if (thread() < N) {
    const float rstd = factors[3 * N + thread()];
    shares[program() * 2 * N + thread()] = Sums::total(scratch, thread());
    shares[program() * 2 * N + N + thread()] = Sums::total(scratch + Sums::FLOATS, thread()) * rstd;
  }
}
constexpr int HEAD_BYTES =
    (at_least(Norm<N, SIDE, ForwardWarps::THREADS>::Sums::FLOATS, 2 * ChannelSums<N / 8, ForwardWarps::NUM>::FLOATS) +
     Norm<N, SIDE, ForwardWarps::THREADS>::FLOATS + N + CLASSES + CLASSES * N) * 4;

// Gradients of the last layer's weight and bias, one after the other, from what `head` gave. A lane has one number,
// each warp a part of the batch.
constexpr int HEAD_GRADS_THREADS = 8 * WARP;
KERNEL(HEAD_GRADS_THREADS)
head_grads(const float* pooled, const float* grad_logits, float* result, int batch, int num_classes) {
  constexpr int WARPS = HEAD_GRADS_THREADS / WARP;
  float* const scratch = reinterpret_cast<float*>(shared_memory());  // [warps][lanes]
  wait_for_launch_before();
  const int at = program() * WARP + thread() % WARP, c = at < num_classes * N ? at / N : at - num_classes * N;
  float total = 0;
  if (c < num_classes)
#pragma unroll 8
    for (int image = thread() / WARP; image < batch; image += WARPS)
      total += grad_logits[image * num_classes + c] * (at < num_classes * N ? pooled[image * N + at % N] : 1);
  scratch[thread()] = total;
  sync_block();
  if (thread() >= WARP || c >= num_classes) return;
  for (int warp = 1; warp < WARPS; warp++) total += scratch[warp * WARP + thread()];
  result[at] = total;
}
