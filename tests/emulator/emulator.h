#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/sm90_format.h"
#include "core/dtype.h"

// One CTA of a Hopper GPU on a CPU: a fiber per thread, scheduled at random. What the hardware does
// in the background (bulk copies, matrix products) happens here at a random moment between its
// issue and the wait for it, and what must not be touched meanwhile holds NaN. A kernel that is
// only right when things happen soon, late or in order gives wrong numbers under some seed.
namespace heddle::emulator {

// Reports what a kernel did wrong and ends the process with status 1
[[noreturn]] void fault(const std::string& what);

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint32_t below(uint32_t n) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>((state_ >> 33) % n);
  }

 private:
  uint64_t state_;
};

// A [b, s, h, d] tensor of 16-bit elements and the box that one copy moves
struct TensorMap {
  uint16_t* data;
  int64_t d, s, h, b;
  int64_t row_stride, head_stride, batch_stride;
  int rows;

  // Null outside
  uint16_t* at(int64_t column, int64_t row, int64_t head, int64_t batch) const {
    if (column < 0 || row < 0 || head < 0 || batch < 0) return nullptr;
    if (column >= d || row >= s || head >= h || batch >= b) return nullptr;
    return data + column + row * row_stride + head * head_stride + batch * batch_stride;
  }
};

// A launch has one dimension, unless its program counts the others
struct Dim {
  int x, y, z;
};

// The 128-byte swizzle, of addresses
constexpr uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Every number of f16 and of e4m3
extern const std::array<std::vector<float>, 2> decoded;

// Of e4m3 in the lower byte; what is beyond its range becomes its largest
inline float decode(DType type, uint16_t bits) {
  if (type == DType::kBF16) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  return type == DType::kF16 ? decoded[0][bits] : decoded[1][bits & 0xff];
}
uint16_t encode(DType type, float value);

class Cta {
 public:
  // One, or several that run at the same time
  Cta(int threads, size_t smem_bytes, uint64_t seed, int ctas = 1);
  void run(const std::function<void()>& kernel);

  // Shared memory. Threads and asynchronous units each have their view of it; fence_async makes
  // what a thread stored visible to the latter.
  uint8_t* smem() { return smem_.data() + kSkew; }
  uint32_t address_of(const void* pointer) const;
  void store(uint32_t address, const void* from, uint32_t nbytes);
  void load(void* to, uint32_t address, uint32_t nbytes);
  void fence_async();

  void barrier_init(uint32_t address, int arrivals);
  void barrier_publish();
  void barrier_arrive(uint32_t address, int64_t expected_bytes);
  bool barrier_passed(uint32_t address, uint32_t parity);
  bool barrier_noticed(uint32_t address, uint32_t parity);
  void barrier_wait(uint32_t address, uint32_t parity);
  void named_arrive(int id, int threads);
  void named_sync(int id, int threads);

  void copy_in(uint32_t address, const TensorMap& map, uint32_t barrier, int column, int row,
               int head, int batch);
  // Without swizzling
  void copy_in(uint32_t address, const void* from, uint32_t nbytes, uint32_t barrier);
  void copy_out(float* to, uint32_t address, uint32_t nbytes);
  void add_out(float* to, uint32_t address, uint32_t nbytes);
  void copy_out(const TensorMap& map, uint32_t address, int column, int row, int head, int batch);
  // 16 bytes, or zeros from null, for this thread
  void request(uint32_t address, const void* from);
  void copies_commit();
  void copies_wait(size_t pending);

  // acc[64, n] (+)= A[64, k] B[k, n], k of 32 bytes; A from a descriptor or from registers
  struct Operands {
    DType type;
    sm90::Major a_major, b_major;
    int n;
    bool accumulate;
    uint64_t a, b;
    bool a_in_registers;
  };
  void products_fence();
  void product(float* acc, const uint32_t* a, const Operands& operands);
  void products_commit();
  void products_wait(size_t pending);

  // Takes registers that other threads of the CTA gave away, once there are enough, or gives some
  void set_registers(int count);

  // Meetings of 32 or 128 threads that belong together
  void meet_warp();
  void meet_warpgroup();
  // What another lane of the warp hands over at the same time
  uint32_t exchange(uint32_t value, int lane);
  std::array<uint32_t, 32> exchange(uint32_t value);
  int elected_lane() const { return elected_; }

  // Of a thread that asks again and again for what another CTA does
  void pause();

  int thread() const { return current_; }

 private:
  static constexpr uint32_t kSkew = 48;  // the kernel has to align its tiles by itself
  using Action = std::function<void()>;

  struct Accumulator {
    std::vector<float> values;
    int products;
  };
  struct Thread {
    ucontext_t context;
    jmp_buf place;
    bool started = false;
    std::unique_ptr<char[]> stack;
    bool done = false;
    std::function<bool()> blocked;
    std::vector<std::pair<uint32_t, uint32_t>> stores;  // address and bytes, not fenced yet
    std::vector<uint32_t> inits;                        // not published yet
    std::vector<Action> open_copies;
    std::vector<std::vector<Action>> copies;
    int registers;
    bool fenced = false;
    std::map<float*, Accumulator> in_flight;
    size_t committed = 0, retired = 0, issued = 0;  // groups, groups, products of the open one
    size_t waits = 0;
  };
  struct Barrier {
    int arrivals, missing;
    int64_t bytes = 0;
    uint32_t phase = 0;
    bool published = false;
  };
  struct Meeting {
    int present = 0;
    uint64_t round = 0;
  };
  struct Product {
    Operands operands;
    float* acc[128] = {};
    const uint32_t* a[128] = {};
  };
  struct Group {
    std::vector<Product> products;
    int committed = 0;
    bool done = false;
  };
  struct Warpgroup {
    std::vector<Group> groups;
    size_t done = 0;
    std::vector<const void*> waits;  // where in the program
  };

  static void enter();
  void yield();
  void resume(Thread& thread);
  void wait_until(std::function<bool()> condition);
  void meet(Meeting& meeting, int threads, const char* what);
  void arrive_later(uint32_t address, uint32_t nbytes, uint32_t barrier, const Action& write);
  uint8_t* async_view(uint32_t address, uint32_t nbytes);
  Barrier& barrier(uint32_t address);
  void settle(Barrier& barrier);
  bool run_background(bool now);
  void execute(int warpgroup, Group& group);
  void read_operand(DType type, uint64_t descriptor, sm90::Major major, int rows, float* to,
                    int row_step, int k_step);
  void finish();
  Meeting& named(int id) { return named_[current_ / threads_of_cta_ * 16 + id]; }
  Thread& self() { return *threads_[static_cast<size_t>(current_)]; }

  Random random_;
  const int threads_of_cta_;
  int pauses_ = 0, free_registers_ = 0;
  int elected_;
  uint32_t pace_;  // how seldom something happens in the background before somebody waits
  std::vector<uint8_t> smem_, async_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warpgroup> warpgroups_;
  std::map<uint32_t, Barrier> barriers_;
  std::map<int, Meeting> named_;
  std::vector<Meeting> warps_, groups_of_warps_;
  std::vector<std::vector<uint32_t>> exchanged_;  // in even meetings of a warp and in odd ones
  std::vector<Action> arriving_;                  // copies into shared memory
  std::function<void()> kernel_;
  jmp_buf scheduler_;
  int current_ = 0;
};

// The CTA that runs, and what CUDA tells its threads
extern Cta* cta;

// Runs CTAs one after the other, from the first or from the last
void launch(int ctas, int threads, size_t smem_bytes, const std::function<void()>& kernel);

// Runs CTAs at the same time; their kernel keeps no shared memory in the emulator's
void launch_together(int ctas, int threads, const std::function<void()>& kernel);

// Seeds every launch that follows
void seed(uint64_t value);

// Whether all warps of a warpgroup must wait for products at the same places, as those do that go
// one way through a kernel
extern bool goes_together;

// What a program's main returns. Runs cases with the random seed that the command line names, all
// or those whose numbers follow it, in this order. `check(c, random)` gives the error as a multiple
// of what is allowed. Of a kernel that is right it tells the numbers from the quickest case on.
template <class Case, size_t N, class Check>
int run_cases(const Case (&cases)[N], int argc, char** argv, const Check& check) {
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  std::vector<size_t> order;
  for (int i = 2; i < argc; ++i) order.push_back(std::strtoull(argv[i], nullptr, 10) % N);
  for (size_t i = 0; argc <= 2 && i < N; ++i) order.push_back(i);
  double worst = 0;
  std::multimap<std::chrono::steady_clock::duration, size_t> times;
  for (const size_t i : order) {
    // a case is the same whatever ran before it
    seed((first * N + i) * 1000);
    Random random(first * N + i);
    const auto began = std::chrono::steady_clock::now();
    const double error = check(cases[i], random);
    if (!(error <= 1)) {
      std::printf("wrong: case %zu: %g times the error allowed\n", i, error);
      return 1;
    }
    worst = std::max(worst, error);
    times.emplace(std::chrono::steady_clock::now() - began, i);
  }
  std::printf("error: %g of what is allowed\nquickest first:", worst);
  for (const auto& [time, i] : times) std::printf(" %zu", i);
  std::printf("\n");
  return 0;
}

}  // namespace heddle::emulator

extern heddle::emulator::Dim threadIdx, blockIdx, blockDim, gridDim;
