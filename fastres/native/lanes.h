// Vectors of floats, and of as many bfloat16 that become floats. They are GCC's own, for any machine, and of the length
// that this one has, since longer ones are slow.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

using Floats = float __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
using Mask = int32_t __attribute__((vector_size(4 * LANES)));
using bf16 = uint16_t;  // the upper half of a float

template <class V, class T>
inline V read(const T* from) {
  V values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

template <class V, class T>
inline void write(T* to, V values) {
  std::memcpy(to, &values, sizeof values);
}

inline Words words(const bf16* from) { return __builtin_convertvector(read<Halves>(from), Words); }

inline Floats load(const float* from) { return read<Floats>(from); }
inline Floats load(const bf16* from) { return (Floats)(words(from) << 16); }

inline void store(float* to, Floats values) { write(to, values); }
inline void store(bf16* to, Floats values) {
  const Words bits = (Words)values;
  const Words nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
  write(to, __builtin_convertvector(nearest, Halves));
}

inline Floats where(Mask mask, Floats values) { return (Floats)((Mask)values & mask); }
