// A GPU for fastres/native/cuda, on a CPU: each thread of a program is a fiber, and what a warp does together is done
// when all its lanes have come to it. What real ones would not forgive is not forgiven: lanes that part, shared memory
// read before it is written (it begins as NaN), a copy read before it was waited for. Warps run one after the other, as
// far as they get, forwards or backwards: a missing sync_block shows in one of the two. A missing sync_warp does not
// where a shuffle follows, at which all lanes of a warp meet here with all that they stored.
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define DEVICE inline
#define KERNEL(threads) static void

struct alignas(16) Octet { u32 pair[4]; };

namespace emulated {
enum Act { RUNS, ENDED, WAITS, WARP_WAITS, SHUFFLES, LOADS, LOADS_TRANSPOSED, MULTIPLIES };
constexpr int LANES = 32, STACK = 256 << 10;

struct Thread {
  ucontext_t context;  // in which it begins; from then on it jumps, since swapcontext asks the system each time
  jmp_buf place;
  bool begun;
  std::vector<char> stack = std::vector<char>(STACK);
  Act act;
  float value;  // of a shuffle
  int from;
  const Octet* row;  // of a load
  u32* to;
  float* acc;  // of a product
  u32 operand[6];
  std::vector<std::pair<Octet*, const Octet*>> copies;
};

inline std::vector<Thread> threads;
inline jmp_buf scheduler;
inline int current, program_x, program_y, programs_x;
inline u8* shared;
inline int turns[2];  // in which shared memory gave rows of matrices, and in how many it could have
inline void (*body)();

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "program %d, thread %d: %s\n", program_x, current, why);
  std::abort();
}

inline void act(Act what) {
  Thread& own = threads[current];
  own.act = what;
  if (!_setjmp(own.place)) _longjmp(scheduler, 1);
}

inline float bf16(u32 bits) {
  bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

[[noreturn]] inline void go_on(Thread& thread) {
  if (thread.begun) _longjmp(thread.place, 1);
  thread.begun = true;
  setcontext(&thread.context);
  fail("it cannot begin");
}

inline void do_together(Thread* warp) {
  const Act what = warp[0].act;
  float values[LANES], a[16][16], b[16][8];
  for (int lane = 0; lane < LANES; lane++) values[lane] = warp[lane].value;
  if (what == LOADS || what == LOADS_TRANSPOSED)
    for (int i = 0; i < 4; i++) {  // 8 rows of 16 bytes, from 32 banks of 4
      int most = 0, rows[8] = {};
      for (int row = 0; row < 8; row++) {
        int& of = rows[(reinterpret_cast<const u8*>(warp[i * 8 + row].row) - shared) / 16 % 8];
        if (++of > most) most = of;
      }
      turns[0] += most;
      turns[1] += 1;
    }
  const auto half = [&](int lane, int operand, int which) {
    return bf16(warp[lane].operand[operand] >> (16 * which) & 0xffff);
  };
  if (what == MULTIPLIES)
    for (int lane = 0; lane < LANES; lane++)
      for (int e = 0; e < 2; e++) {
        for (int i = 0; i < 4; i++) a[lane / 4 + i % 2 * 8][lane % 4 * 2 + e + i / 2 * 8] = half(lane, i, e);
        for (int i = 0; i < 2; i++) b[lane % 4 * 2 + e + i * 8][lane / 4] = half(lane, 4 + i, e);
      }
  for (int lane = 0; lane < LANES; lane++) {
    Thread& own = warp[lane];
    if (what == SHUFFLES) own.value = values[own.from];
    if (what == LOADS || what == LOADS_TRANSPOSED)
      for (int i = 0; i < 4; i++) {
        const auto element = [&](int row, int column) {
          return warp[i * 8 + row].row->pair[column / 2] >> (16 * (column % 2)) & 0xffff;
        };
        const int row = lane / 4, column = lane % 4 * 2;
        own.to[i] = what == LOADS ? element(row, column) | element(row, column + 1) << 16
                                  : element(column, row) | element(column + 1, row) << 16;
      }
    if (what == MULTIPLIES)
      for (int i = 0; i < 4; i++) {
        double sum = own.acc[i];
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) sum += static_cast<double>(a[row][k]) * b[k][column];
        own.acc[i] = static_cast<float>(sum);
      }
  }
}

inline void run(int num_threads, int bytes, bool backwards) {
  if (static_cast<int>(threads.size()) < num_threads) threads.resize(num_threads);
  std::vector<u8> memory(bytes + 128 + 16, 0xff);
  shared = memory.data() + (128 - reinterpret_cast<size_t>(memory.data()) % 128);
  u8 guard[16];
  std::memset(guard, 0xff, 16);
  for (int i = 0; i < num_threads; i++) {
    Thread& own = threads[i];
    own.act = RUNS;
    own.begun = false;
    own.copies.clear();
    getcontext(&own.context);
    own.context.uc_stack.ss_sp = own.stack.data();
    own.context.uc_stack.ss_size = STACK;
    own.context.uc_link = nullptr;
    makecontext(&own.context, +[] { body(); act(ENDED); }, 0);
  }
  for (bool ended = false; !ended;) {
    int waiting = 0, done = 0;
    for (int i = 0; i < num_threads / LANES; i++) {
      Thread* const warp = &threads[(backwards ? num_threads / LANES - 1 - i : i) * LANES];
      while (warp->act != WAITS && warp->act != ENDED) {
        for (int lane = 0; lane < LANES; lane++) {
          current = static_cast<int>(warp - threads.data()) + lane;
          if (!_setjmp(scheduler)) go_on(warp[lane]);
          if (warp[lane].act != warp->act) fail("lanes of a warp have parted");
        }
        if (warp->act != WAITS && warp->act != ENDED) do_together(warp);
      }
      (warp->act == WAITS ? waiting : done) += 1;
    }
    if (waiting && done) fail("some warps wait for others that have ended");
    ended = !waiting;
    if (!ended)
      for (int i = 0; i < num_threads; i++) threads[i].act = RUNS;
  }
  if (std::memcmp(shared + bytes, guard, 16)) fail("wrote behind its shared memory");
}

template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** params, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(params[I])...);
}

inline void** params;
template <auto kernel, typename... A>
void call_as(void (*)(A...)) {
  call(kernel, params, std::index_sequence_for<A...>());
}
template <auto kernel>
void enter() {
  call_as<kernel>(kernel);
}
}  // namespace emulated

DEVICE int thread() { return emulated::current; }
DEVICE int program() { return emulated::program_x; }
DEVICE int which_layer() { return emulated::program_y; }
DEVICE int num_programs() { return emulated::programs_x; }
DEVICE u8* shared_memory() { return emulated::shared; }
DEVICE void wait_for_launch_before() {}
DEVICE void sync_block() { emulated::act(emulated::WAITS); }
DEVICE void sync_warp() { emulated::act(emulated::WARP_WAITS); }
DEVICE float shuffle(float value, int lane) {
  emulated::Thread& own = emulated::threads[emulated::current];
  own.value = value;
  own.from = lane;
  emulated::act(emulated::SHUFFLES);
  return own.value;
}
DEVICE float shuffle_xor(float value, int mask) { return shuffle(value, thread() % emulated::LANES ^ mask); }
DEVICE float as_float(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
DEVICE float exponential(float value) { return std::exp(value); }
DEVICE float logarithm(float value) { return std::log(value); }
DEVICE float root(float value) { return std::sqrt(value); }
DEVICE float relu(float value) { return value < 0 ? 0 : value; }
DEVICE u32 rounded(float value) {  // to bfloat16, to the nearest, to even
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 pack(float low, float high) { return rounded(low) | rounded(high) << 16; }
DEVICE void cp_async_16(Octet* shared, const Octet* global) {
  emulated::threads[emulated::current].copies.push_back({shared, global});
}
DEVICE void cp_async_wait_all() {
  auto& copies = emulated::threads[emulated::current].copies;
  for (const auto& copy : copies) *copy.first = *copy.second;
  copies.clear();
}
DEVICE void ldmatrix_x4(u32 (&to)[4], const Octet* row) {
  emulated::Thread& own = emulated::threads[emulated::current];
  own.to = to;
  own.row = row;
  emulated::act(emulated::LOADS);
}
DEVICE void ldmatrix_x4_trans(u32 (&to)[4], const Octet* row) {
  emulated::Thread& own = emulated::threads[emulated::current];
  own.to = to;
  own.row = row;
  emulated::act(emulated::LOADS_TRANSPOSED);
}
DEVICE void mma_m16n8k16(float (&acc)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  emulated::Thread& own = emulated::threads[emulated::current];
  own.acc = acc;
  const u32 operands[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(own.operand, operands, sizeof operands);
  emulated::act(emulated::MULTIPLIES);
}
