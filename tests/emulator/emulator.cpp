#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>

heddle::emulator::Dim threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

namespace heddle::emulator {

Cta* cta = nullptr;

namespace {
uint64_t next_seed = 1;
constexpr size_t kStackBytes = 96 * 1024;
constexpr uint32_t kMostSmem = 232448;
constexpr int kRegisters = 65536, kMostRegisters = 248;  // of a multiprocessor, of a thread
}  // namespace

void seed(uint64_t value) { next_seed = value; }

bool goes_together = false;

void fault(const std::string& what) {
  std::printf("fault: %s (block %d, thread %d)\n", what.c_str(), blockIdx.x, threadIdx.x);
  std::fflush(stdout);
  std::_Exit(1);
}

namespace {
// With so many bits of exponent, of mantissa, and less than it as 1 has
std::vector<float> decode_all(int exponent_bits, int mantissa_bits, int bias, bool infinite) {
  std::vector<float> all;
  const int sign = 1 << (exponent_bits + mantissa_bits), first = 1 << mantissa_bits;
  for (int code = 0; code < 2 * sign; ++code) {
    const int size = code % sign, exponent = size / first, mantissa = size % first;
    float value = std::ldexp(static_cast<float>(exponent ? first + mantissa : mantissa),
                             std::max(exponent, 1) - bias - mantissa_bits);
    if (infinite && exponent == sign / first - 1) value = mantissa ? NAN : INFINITY;
    if (!infinite && size == sign - 1) value = NAN;
    all.push_back(code < sign ? value : -value);
  }
  return all;
}
}  // namespace

const std::array<std::vector<float>, 2> decoded{decode_all(5, 10, 15, true),
                                                decode_all(4, 3, 7, false)};

uint16_t encode(DType type, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (type == DType::kBF16) {
    if (std::isnan(value)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  const float size = std::fabs(value);
  // units of the last place: as many bits below the leading one, or those of the smallest numbers
  const auto steps_of = [size](int digits, int smallest) {
    int exponent = 0;
    std::frexp(size, &exponent);
    const int unit = std::max(exponent - digits - 1, smallest);
    const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -unit)));
    return static_cast<uint16_t>((static_cast<uint32_t>(unit - smallest) << digits) + steps);
  };
  if (type == DType::kE4M3) {
    const auto sign = static_cast<uint16_t>(bits >> 24 & 0x80);
    if (std::isnan(value)) return sign | 0x7f;
    return static_cast<uint16_t>(sign | (size >= 448 ? 0x7e : size == 0 ? 0 : steps_of(3, -9)));
  }
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7fff);
  if (size >= 65520) return static_cast<uint16_t>(sign | 0x7c00);
  return static_cast<uint16_t>(sign + (size == 0 ? 0 : steps_of(10, -24)));
}

Cta::Cta(int threads, size_t smem_bytes, uint64_t seed, int ctas)
    : random_(seed),
      threads_of_cta_(threads),
      elected_(static_cast<int>(random_.below(32))),
      pace_(1 + random_.below(3) * random_.below(60)),
      smem_(smem_bytes + kSkew, 0xff),
      async_(smem_bytes + kSkew, 0xff),
      warpgroups_(static_cast<size_t>(threads * ctas + 127) / 128),
      warps_(static_cast<size_t>(threads * ctas) / 32),
      groups_of_warps_(warpgroups_.size()),
      exchanged_(2, std::vector<uint32_t>(static_cast<size_t>(threads * ctas))) {
  if (threads % 32 != 0 || threads > 1024)
    fault("a CTA of " + std::to_string(threads) + " threads");
  if (smem_bytes > kMostSmem) fault(std::to_string(smem_bytes) + " bytes of shared memory");
  for (int i = 0; i < threads * ctas; ++i) {
    threads_.push_back(std::make_unique<Thread>());
    threads_.back()->registers = std::min(kRegisters / threads / 8 * 8, kMostRegisters);
  }
}

uint32_t Cta::address_of(const void* pointer) const {
  const auto offset = static_cast<const uint8_t*>(pointer) - smem_.data();
  if (offset < 0 || static_cast<size_t>(offset) > smem_.size()) fault("not in shared memory");
  return static_cast<uint32_t>(offset);
}

uint8_t* Cta::async_view(uint32_t address, uint32_t nbytes) {
  if (address < kSkew || address + nbytes > smem_.size()) fault("shared memory overrun");
  return async_.data() + address;
}

void Cta::store(uint32_t address, const void* from, uint32_t nbytes) {
  async_view(address, nbytes);
  std::memcpy(smem_.data() + address, from, nbytes);
  self().stores.push_back({address, nbytes});
}

void Cta::load(void* to, uint32_t address, uint32_t nbytes) {
  async_view(address, nbytes);
  std::memcpy(to, smem_.data() + address, nbytes);
}

void Cta::fence_async() {
  // what is there by now: another thread may have stored over it since
  for (const auto& [address, nbytes] : self().stores)
    std::memcpy(async_.data() + address, smem_.data() + address, nbytes);
  self().stores.clear();
}

// --- threads

void Cta::enter() {
  cta->kernel_();
  cta->self().done = true;
  _longjmp(cta->scheduler_, 1);
}

// Contexts only begin threads: to swap them asks the system for the signal mask each time
void Cta::yield() {
  if (_setjmp(self().place) == 0) _longjmp(scheduler_, 1);
}

void Cta::resume(Thread& thread) {
  if (_setjmp(scheduler_) != 0) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  setcontext(&thread.context);
}

void Cta::wait_until(std::function<bool()> condition) {
  if (condition()) {
    // what is done may be noticed late
    if (random_.below(4) == 0) yield();
    return;
  }
  self().blocked = std::move(condition);
  yield();
}

void Cta::run(const std::function<void()>& kernel) {
  kernel_ = kernel;
  for (auto& thread : threads_) {
    thread->stack.reset(new char[kStackBytes]);
    getcontext(&thread->context);
    thread->context.uc_stack.ss_sp = thread->stack.get();
    thread->context.uc_stack.ss_size = kStackBytes;
    makecontext(&thread->context, enter, 0);
  }
  const auto count = static_cast<uint32_t>(threads_.size());
  uint32_t left = count, hold = 0;
  uint32_t stalled = 0, end = 0;  // threads of a warp or a warpgroup that get no turn for a while
  for (bool idle = false; left > 0;) {
    if (hold == 0) {
      hold = 1 + random_.below(400);
      const uint32_t size = random_.below(2) ? 32 : 128;
      stalled = size * random_.below((count + size - 1) / size + 1);  // or none
      end = stalled + size;
    }
    --hold;
    bool ran = false;
    if (idle || random_.below(3) == 0) ran = run_background(idle);
    const uint32_t first = random_.below(count), step = random_.below(2) ? 1 : count - 1;
    for (uint32_t i = 0, at = first; i < count; ++i, at = (at + step) % count) {
      Thread& thread = *threads_[at];
      if (thread.done || (!idle && at >= stalled && at < end)) continue;
      if (thread.blocked && !thread.blocked()) continue;
      thread.blocked = nullptr;
      current_ = static_cast<int>(at);
      threadIdx.x = current_ % threads_of_cta_;
      if (count > static_cast<uint32_t>(threads_of_cta_)) blockIdx.x = current_ / threads_of_cta_;
      ran = true;
      resume(thread);
      if (thread.done) --left;
    }
    if (!ran && idle) fault("deadlock, " + std::to_string(left) + " threads wait");
    idle = !ran;
  }
  finish();
}

void Cta::finish() {
  if (!arriving_.empty()) fault("a copy into shared memory was not waited for");
  for (const auto& thread : threads_) {
    if (!thread->copies.empty() || !thread->open_copies.empty())
      fault("a copy out of shared memory was not waited for");
    if (!thread->in_flight.empty() || thread->issued) fault("a product was not waited for");
  }
}

// --- background

bool Cta::run_background(bool now) {
  bool ran = false;
  const auto chance = [&] { return now || random_.below(pace_) == 0; };
  if (!arriving_.empty() && chance()) {
    const uint32_t i = random_.below(static_cast<uint32_t>(arriving_.size()));
    const Action arrive = std::move(arriving_[i]);
    arriving_.erase(arriving_.begin() + i);
    arrive();
    ran = true;
  }
  for (size_t w = 0; w < warpgroups_.size(); ++w) {
    Warpgroup& warpgroup = warpgroups_[w];
    if (warpgroup.done == warpgroup.groups.size() || !chance()) continue;
    Group& group = warpgroup.groups[warpgroup.done];
    // The last thread to commit may be far behind
    if (group.committed < 128) continue;
    execute(static_cast<int>(w), group);
    ran = true;
  }
  return ran;
}

// --- barriers

Cta::Barrier& Cta::barrier(uint32_t address) {
  const auto found = barriers_.find(address);
  if (found == barriers_.end()) fault("a barrier that was not initialised");
  return found->second;
}

void Cta::settle(Barrier& barrier) {
  if (barrier.missing < 0) fault("more arrivals than a barrier expects");
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
}

void Cta::barrier_init(uint32_t address, int arrivals) {
  if (address % 8 != 0) fault("a barrier must lie on 8 bytes");
  Barrier fresh{};
  fresh.arrivals = fresh.missing = arrivals;
  barriers_[address] = fresh;
  self().inits.push_back(address);
}

void Cta::barrier_publish() {
  for (const uint32_t address : self().inits) barrier(address).published = true;
  self().inits.clear();
}

void Cta::barrier_arrive(uint32_t address, int64_t expected_bytes) {
  Barrier& at = barrier(address);
  if (!at.published) fault("a barrier was used before its initialisation was fenced");
  at.bytes += expected_bytes;
  --at.missing;
  settle(at);
}

bool Cta::barrier_passed(uint32_t address, uint32_t parity) {
  if (!barrier(address).published) fault("a barrier was used before its initialisation was fenced");
  return (barrier(address).phase & 1) != parity;
}

bool Cta::barrier_noticed(uint32_t address, uint32_t parity) {
  // what is done may be noticed late, by one lane of two warps in five
  return barrier_passed(address, parity) && random_.below(64) > 0;
}

void Cta::barrier_wait(uint32_t address, uint32_t parity) {
  wait_until([this, address, parity] { return barrier_passed(address, parity); });
}

void Cta::meet(Meeting& meeting, int threads, const char* what) {
  const uint64_t round = meeting.round;
  if (++meeting.present > threads) fault(std::string(what) + " has more arrivals than it expects");
  if (meeting.present == threads) {
    meeting.present = 0;
    ++meeting.round;
  }
  wait_until([&meeting, round] { return meeting.round > round; });
}

void Cta::meet_warp() { meet(warps_[static_cast<size_t>(current_) / 32], 32, "a warp"); }
void Cta::meet_warpgroup() {
  meet(groups_of_warps_[static_cast<size_t>(current_) / 128], 128, "a warpgroup");
}

void Cta::named_arrive(int id, int threads) {
  if (id < 0 || id > 15 || threads % 32 != 0) fault("no such named barrier");
  Meeting& meeting = named(id);
  if (++meeting.present > threads)
    fault("named barrier " + std::to_string(id) + " has more arrivals than it expects");
  if (meeting.present == threads) {
    meeting.present = 0;
    ++meeting.round;
  }
}

void Cta::named_sync(int id, int threads) {
  Meeting& meeting = named(id);
  const uint64_t round = meeting.round;
  named_arrive(id, threads);
  wait_until([&meeting, round] { return meeting.round > round; });
}

uint32_t Cta::exchange(uint32_t value, int lane) {
  return exchange(value)[static_cast<size_t>(lane)];
}

std::array<uint32_t, 32> Cta::exchange(uint32_t value) {
  // One that goes on hands over to the next meeting, which all have to come to before the one
  // behind
  auto& values = exchanged_[warps_[static_cast<size_t>(current_) / 32].round % 2];
  values[static_cast<size_t>(current_)] = value;
  meet_warp();
  std::array<uint32_t, 32> all;
  std::copy_n(values.begin() + current_ / 32 * 32, 32, all.begin());
  return all;
}

void Cta::pause() {
  if (++pauses_ > 1'000'000) fault("a wait for what never happens");
  yield();
}

// --- copies

void Cta::copy_in(uint32_t address, const TensorMap& map, uint32_t to_signal, int column, int row,
                  int head, int batch) {
  if (address % 1024 != 0) fault("a swizzled tile must start on 1024 bytes");
  arrive_later(address, static_cast<uint32_t>(map.rows) * 128, to_signal, [=, this] {
    for (int r = 0; r < map.rows; ++r)
      for (int c = 0; c < 64; ++c) {
        const uint16_t* from = map.at(column + c, row + r, head, batch);
        const uint16_t value = from ? *from : 0;
        const uint32_t to = swizzle(address + static_cast<uint32_t>(r * 128 + c * 2));
        std::memcpy(async_.data() + to, &value, 2);
        std::memcpy(smem_.data() + to, &value, 2);
      }
  });
}

void Cta::copy_in(uint32_t address, const void* from, uint32_t nbytes, uint32_t to_signal) {
  if (address % 16 || nbytes % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    fault("a bulk copy off 16 bytes");
  arrive_later(address, nbytes, to_signal, [=, this] {
    std::memcpy(async_.data() + address, from, nbytes);
    std::memcpy(smem_.data() + address, from, nbytes);
  });
}

void Cta::arrive_later(uint32_t address, uint32_t nbytes, uint32_t to_signal, const Action& write) {
  if (!barrier(to_signal).published)
    fault("a barrier was used before its initialisation was fenced");
  std::memset(async_view(address, nbytes), 0xff, nbytes);
  std::memset(smem_.data() + address, 0xff, nbytes);
  arriving_.push_back([=, this] {
    write();
    Barrier& full = barrier(to_signal);
    full.bytes -= nbytes;
    settle(full);
  });
}

void Cta::copy_out(float* to, uint32_t address, uint32_t nbytes) {
  if (address % 16 || nbytes % 16 || reinterpret_cast<uintptr_t>(to) % 16)
    fault("a bulk copy off 16 bytes");
  const uint8_t* from = async_view(address, nbytes);
  self().open_copies.push_back([=] { std::memcpy(to, from, nbytes); });
}

void Cta::add_out(float* to, uint32_t address, uint32_t nbytes) {
  if (address % 16 || nbytes % 16 || reinterpret_cast<uintptr_t>(to) % 16)
    fault("a bulk copy off 16 bytes");
  const uint8_t* from = async_view(address, nbytes);
  self().open_copies.push_back([=] {
    for (uint32_t i = 0; i < nbytes / 4; ++i) {
      float value;
      std::memcpy(&value, from + 4 * i, 4);
      to[i] += value;
    }
  });
}

void Cta::copy_out(const TensorMap& map, uint32_t address, int column, int row, int head,
                   int batch) {
  if (address % 1024 != 0) fault("a swizzled tile must start on 1024 bytes");
  async_view(address, static_cast<uint32_t>(map.rows) * 128);
  self().open_copies.push_back([=, this] {
    for (int r = 0; r < map.rows; ++r)
      for (int c = 0; c < 64; ++c) {
        const uint32_t from = swizzle(address + static_cast<uint32_t>(r * 128 + c * 2));
        if (uint16_t* to = map.at(column + c, row + r, head, batch))
          std::memcpy(to, async_.data() + from, 2);
      }
  });
}

void Cta::request(uint32_t address, const void* from) {
  if (address % 16 || reinterpret_cast<uintptr_t>(from) % 16) fault("a request off 16 bytes");
  std::memset(async_view(address, 16), 0xff, 16);
  std::memset(smem_.data() + address, 0xff, 16);
  self().open_copies.push_back([=, this] {
    uint8_t* to = smem_.data() + address;
    from ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
    self().stores.emplace_back(address, 16);
  });
}

void Cta::copies_commit() {
  self().copies.push_back(std::move(self().open_copies));
  self().open_copies.clear();
}

void Cta::copies_wait(size_t pending) {
  auto& copies = self().copies;
  // the reader comes as late as it may
  while (random_.below(2)) yield();
  while (copies.size() > pending) {
    for (const Action& copy : copies.front()) copy();
    copies.erase(copies.begin());
  }
}

// --- products

void Cta::products_fence() { self().fenced = true; }

void Cta::product(float* acc, const uint32_t* a, const Operands& operands) {
  Thread& thread = self();
  Warpgroup& warpgroup = warpgroups_[static_cast<size_t>(current_) / 128];
  if (warpgroup.groups.size() <= thread.committed) warpgroup.groups.resize(thread.committed + 1);
  auto& products = warpgroup.groups[thread.committed].products;
  if (products.size() <= thread.issued) {
    if (warpgroup.groups[thread.committed].committed > 0)
      fault("the threads of a warpgroup issue different products");
    products.resize(thread.issued + 1);
    products[thread.issued].operands = operands;
  }
  Product& product = products[thread.issued++];
  const Operands& first = product.operands;
  if (first.a != operands.a || first.b != operands.b || first.accumulate != operands.accumulate)
    fault("the threads of a warpgroup give a product different operands");
  product.acc[current_ % 128] = acc;
  product.a[current_ % 128] = a;

  auto found = thread.in_flight.find(acc);
  if (found == thread.in_flight.end()) {
    if (!thread.fenced) fault("a product on registers without a fence");
    const int registers = operands.n / 2;
    found = thread.in_flight.insert({acc, {{acc, acc + registers}, 0}}).first;
    std::fill_n(acc, registers, NAN);
  }
  ++found->second.products;
}

void Cta::products_commit() {
  Thread& thread = self();
  auto& groups = warpgroups_[static_cast<size_t>(current_) / 128].groups;
  if (groups.size() <= thread.committed) groups.resize(thread.committed + 1);
  Group& group = groups[thread.committed++];
  if (thread.issued != group.products.size() && group.committed > 0)
    fault("the threads of a warpgroup issue different products");
  ++group.committed;
  thread.issued = 0;
}

void Cta::set_registers(int count) {
  Thread& thread = self();
  const int more = count - thread.registers;
  while (more > 0 && free_registers_ < more)
    wait_until([this, more] { return free_registers_ >= more; });
  free_registers_ -= more;
  thread.registers = count;
}

void Cta::products_wait(size_t pending) {
  const auto index = static_cast<size_t>(current_) / 128;
  Thread& thread = self();
  if (goes_together) {
    const void* place = __builtin_return_address(0);
    std::vector<const void*>& waits = warpgroups_[index].waits;
    if (waits.size() == thread.waits) waits.push_back(place);
    if (waits[thread.waits++] != place)
      fault("the threads of a warpgroup wait for products at different places");
  }
  const size_t target = thread.committed > pending ? thread.committed - pending : 0;
  wait_until([this, index, target] { return warpgroups_[index].done >= target; });
  const auto lane = static_cast<size_t>(current_) % 128;
  for (; thread.retired < target; ++thread.retired)
    for (const Product& product : warpgroups_[index].groups[thread.retired].products) {
      const auto found = thread.in_flight.find(product.acc[lane]);
      if (--found->second.products > 0) continue;
      std::copy(found->second.values.begin(), found->second.values.end(), product.acc[lane]);
      thread.in_flight.erase(found);
    }
  // from here on registers may change again
  thread.fenced = false;
}

// Rows of an operand with k of 32 bytes, from 16 bytes at a time; element (row, k) comes to
// to[row * row_step + k * k_step]
void Cta::read_operand(DType type, uint64_t descriptor, sm90::Major major, int rows, float* to,
                       int row_step, int k_step) {
  const auto field = [&](int shift) {
    return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4;
  };
  const uint32_t base = field(0), leading = field(16), stride = field(32);
  if (descriptor >> 62 != 1) fault("a descriptor without 128-byte swizzle");
  const int nbytes = static_cast<int>(size_of(type)), each = 16 / nbytes;
  const bool along_k = major == sm90::Major::kK;
  if (nbytes == 1 && !along_k) fault("an operand of 8 bits that is not kK");
  const int depth = 2 * each, step = along_k ? k_step : row_step;
  for (int row = 0; row < rows; row += along_k ? 1 : each)
    for (int k = 0; k < depth; k += along_k ? each : 1) {
      const auto r = static_cast<uint32_t>(row), column = static_cast<uint32_t>(k);
      const uint32_t at =
          along_k ? base + r % 8 * 128 + r / 8 * stride + static_cast<uint32_t>(nbytes) * column
                  : base + 2 * (r % 64) + r / 64 * leading + column % 8 * 128 + column / 8 * stride;
      const uint8_t* from = async_view(swizzle(at), 16);
      float* first = to + row * row_step + k * k_step;
      for (int i = 0; i < each; ++i) {
        uint16_t bits = 0;
        std::memcpy(&bits, from + i * nbytes, static_cast<size_t>(nbytes));
        first[i * step] = decode(type, bits);
      }
    }
}

void Cta::execute(int warpgroup, Group& group) {
  for (const Product& product : group.products) {
    const Operands& operands = product.operands;
    const auto n = static_cast<size_t>(operands.n);
    // elements of a register, and of 32 bytes
    const int each = 4 / static_cast<int>(size_of(operands.type)), depth = 8 * each;
    std::vector<float> a(static_cast<size_t>(64 * depth)), b(static_cast<size_t>(depth) * n);
    for (int row = 0; row < 64 && operands.a_in_registers; ++row)
      for (int k = 0; k < depth; ++k) {
        const int lane = row / 16 * 32 + row % 8 * 4 + k % (4 * each) / each;
        const uint32_t word = product.a[lane][row % 16 / 8 + 2 * (k / (4 * each))];
        a[static_cast<size_t>(row * depth + k)] =
            decode(operands.type, static_cast<uint16_t>(word >> (k % each * 32 / each)));
      }
    if (!operands.a_in_registers)
      read_operand(operands.type, operands.a, operands.a_major, 64, a.data(), depth, 1);
    read_operand(operands.type, operands.b, operands.b_major, operands.n, b.data(), 1, operands.n);
    std::vector<float> sums(64 * n);
    const auto each_value = [&](const auto& visit) {
      for (size_t t = 0; t < 128; ++t) {
        auto& values =
            threads_[static_cast<size_t>(warpgroup) * 128 + t]->in_flight.at(product.acc[t]).values;
        for (size_t i = 0; i < n / 2; ++i) {
          const size_t row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8;
          visit(values[i], sums[row * n + i / 4 * 8 + t % 4 * 2 + i % 2]);
        }
      }
    };
    if (operands.accumulate) each_value([](float value, float& sum) { sum = value; });
    for (size_t row = 0; row < 64; ++row)
      for (size_t k = 0; k < static_cast<size_t>(depth); ++k) {
        const float factor = a[row * static_cast<size_t>(depth) + k];
        for (size_t column = 0; column < n; ++column)
          sums[row * n + column] += factor * b[k * n + column];
      }
    each_value([](float& value, float sum) { value = sum; });
  }
  group.done = true;
  ++warpgroups_[static_cast<size_t>(warpgroup)].done;
}

void launch(int ctas, int threads, size_t smem_bytes, const std::function<void()>& kernel) {
  gridDim.x = ctas;
  blockDim.x = threads;
  // in any order, for no CTA may rely on another one being first
  std::vector<int> order(static_cast<size_t>(ctas));
  std::iota(order.begin(), order.end(), 0);
  Random random(next_seed++);
  for (size_t i = order.size(); i > 1; --i)
    std::swap(order[i - 1], order[random.below(static_cast<uint32_t>(i))]);
  for (const int block : order) {
    blockIdx.x = block;
    Cta here(threads, smem_bytes, next_seed++);
    cta = &here;
    here.run(kernel);
    cta = nullptr;
  }
}

void launch_together(int ctas, int threads, const std::function<void()>& kernel) {
  gridDim.x = ctas;
  blockDim.x = threads;
  blockIdx.x = 0;
  Cta here(threads, 0, next_seed++, ctas);
  cta = &here;
  here.run(kernel);
  cta = nullptr;
}

}  // namespace heddle::emulator
