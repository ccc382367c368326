// Emulates csrc/cuda/hopper.h for cuda_on_host.h.
//
// Loads land, and products read shared memory, at any time between the call and the wait for them: a
// coin decides, so that a wait that is missing, or at the wrong place, shows. Barriers count arrivals
// and bytes by parity as a GPU does, and one arrival too many throws. Shared memory has addresses of
// its own, and operands of products are decoded from their 64 bits.
#pragma once

#include <cmath>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/dtypes.h"
#include "cuda_on_host.h"

namespace hopper_on_host {

using cuda_on_host::block;

constexpr uint32_t kSharedBase = 0x410;  // of the first byte: aligned as the memory is

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("hopper_on_host: " + what);
}

inline uint32_t shared_address(const void* p) {
  const char* begin = block.shared_begin[block.own()];
  return kSharedBase + static_cast<uint32_t>(static_cast<const char*>(p) - begin);
}
inline char* at(int which, uint32_t address) {
  return block.shared_begin[which] + (address - kSharedBase);
}
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline uint32_t cluster_rank() { return static_cast<uint32_t>(block.own()); }
inline void cluster_sync() { cuda_on_host::wait(cuda_on_host::Wait::kCluster); }

struct Barrier {
  int arrivals, missing;
  int64_t bytes;
  uint32_t phase;

  void init(uint32_t n) { *this = {static_cast<int>(n), static_cast<int>(n), 0, 0}; }
  void expect(uint32_t more) {
    bytes += more;
    arrived();
  }
  void arrive(uint32_t rank) {
    bool live = false;
    for (int i = 0; i < block.threads; ++i) {
      live |= !block.fibers[static_cast<int>(rank) * block.threads + i]->done;
    }
    if (!live) fail("an arrival at a block that has ended");
    there(rank).arrived();
  }
  void wait(uint32_t parity) {
    cuda_on_host::wait_until([=] { return (phase & 1) != parity; });
  }

  Barrier& there(uint32_t rank) {
    return *reinterpret_cast<Barrier*>(at(static_cast<int>(rank), shared_address(this)));
  }
  void landed(uint32_t n) {
    bytes -= n;
    end();
  }

 private:
  void arrived() {
    if (missing <= 0) fail("an arrival too many, or at a barrier that was not set up");
    --missing;
    end();
  }
  void end() {
    if (missing != 0 || bytes != 0) return;
    ++phase;
    missing = arrivals;
  }
};

struct TileMap {
  const uint16_t* base;
  int64_t rows, columns;
  int box_rows;
};
inline TileMap tile_map(const void* base, bool, int64_t rows, int64_t columns, int box_rows) {
  if (reinterpret_cast<uintptr_t>(base) % 16 || columns % 8 || box_rows > 256) fail("no such map");
  return {static_cast<const uint16_t*>(base), rows, columns, box_rows};
}

inline void load_tile(const TileMap& map, void* to, Barrier& barrier, int row, int column,
                      uint16_t blocks) {
  const uint32_t address = shared_address(to);
  if (address % 1024 || column % 64) fail("a tile that is not aligned");
  for (int which = 0; which < block.blocks; ++which) {
    if (!(blocks >> which & 1)) continue;
    Barrier* counts = &barrier.there(static_cast<uint32_t>(which));
    const auto land = [=] {
      for (int r = 0; r < map.box_rows; ++r) {
        for (int c = 0; c < 64; ++c) {
          const bool inside = row + r < map.rows && column + c < map.columns;
          const uint16_t v = inside ? map.base[(row + r) * map.columns + column + c] : 0;
          std::memcpy(at(which, swizzled(address + static_cast<uint32_t>(128 * r + 2 * c))), &v, 2);
        }
      }
      counts->landed(static_cast<uint32_t>(map.box_rows) * 128);
    };
    if (block.coin()) {
      land();
    } else {
      block.later.push_back(land);
    }
  }
}
inline void load_tile(const TileMap& map, void* to, Barrier& barrier, int row, int column) {
  load_tile(map, to, barrier, row, column, static_cast<uint16_t>(1 << block.own()));
}

inline void arrive_at(int barrier, int threads) {
  cuda_on_host::Named& n = block.named[block.own()][barrier];
  if (++n.arrived < threads) return;
  n.arrived = 0;
  ++n.turn;
}
inline void sync_at(int barrier, int threads) {
  cuda_on_host::Named& n = block.named[block.own()][barrier];
  const int turn = n.turn;
  arrive_at(barrier, threads);
  cuda_on_host::wait_until([=, &n] { return n.turn != turn; });
}

template <int kRegisters>
void keep_registers() {
  static_assert(24 <= kRegisters && kRegisters <= 240 && kRegisters % 8 == 0, "setmaxnreg");
}

struct Operand {
  uint32_t address, rows8;
  explicit Operand(uint64_t bits)
      : address(static_cast<uint32_t>(bits & 0x3fff) << 4),
        rows8(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1 || (bits >> 49 & 7) != 0) fail("an operand that is not swizzled so");
  }
  template <class T>
  float get(int which, int row, int column) const {
    const auto offset = static_cast<uint32_t>(row / 8) * rows8 + row % 8 * 128u + column * 2u;
    T v;
    std::memcpy(&v, at(which, swizzled(address + offset)), 2);
    return fastsae::widen(v);
  }
};

inline void fence_products() {}
template <class T>
void multiply(float (&acc)[128], uint64_t a, uint64_t b, int add) {
  const Operand left(a), right(b);
  const int which = block.own(), thread = block.current % 128;
  float* to = acc;
  auto form = [=] {
    const int lane = thread % 32, row = thread / 32 * 16 + lane / 4;
    float x[2][16];
    for (int h = 0; h < 2; ++h) {
      for (int k = 0; k < 16; ++k) x[h][k] = left.get<T>(which, row + 8 * h, k);
    }
    for (int i = 0; i < 64; ++i) {
      const int column = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
      float w[16];
      for (int k = 0; k < 16; ++k) w[k] = right.get<T>(which, column, k);
      for (int h = 0; h < 2; ++h) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += x[h][k] * w[k];
        float& score = to[i / 2 * 4 + 2 * h + i % 2];
        score = add ? score + sum : sum;
      }
    }
  };
  cuda_on_host::Fiber& fiber = *block.fibers[block.current];
  fiber.products.push_back({std::move(form), fiber.batch});
}
inline void form_products(int before) {
  auto& mine = block.fibers[block.current]->products;
  for (; !mine.empty() && mine.front().batch < before; mine.pop_front()) mine.front().form();
}
inline void commit_products() {
  const int batch = ++block.fibers[block.current]->batch;
  if (block.coin()) form_products(batch);
}
template <int kPending>
void wait_products(float (&)[128]) {
  form_products(block.fibers[block.current]->batch - kPending);
}

}  // namespace hopper_on_host
