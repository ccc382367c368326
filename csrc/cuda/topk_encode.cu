// topk_encode, the product of its "hopper" design: records the scores that can be among the k best.
//
// scores = x W^T for some columns, in tiles of 128 tokens x 256 latents that are never stored: of
// every 8 scores that a thread holds of a token, the largest is compared with the token's
// threshold, and the 8 are recorded where it is above. triton_kernels/topk_encode/fused.py makes
// the thresholds and selects from the records; its own product does the same by Triton.
//
// A cluster is two blocks with the same latents and different tokens: each loads half of the
// latents' rows for both. In a block one warp loads, four steps of 64 columns ahead, and two groups
// of four warps multiply 64 tokens each. The second group is kept two steps behind the first, so
// that one group's comparisons run while the other's products do.
#include "cuda/hopper.h"

namespace fastsae {
namespace cuda {
namespace {

constexpr const char* kOp = "topk_encode";
constexpr int kBlocks = 2;     // of a cluster
constexpr int kTokens = 128;   // of a tile
constexpr int kLatents = 256;  // of a tile
constexpr int kWidth = 64;     // columns of a step
constexpr int kSteps = 4;      // in flight
constexpr int kThreads = 3 * kGroup;
constexpr int kRecord = 8;  // scores of a record
constexpr int kApart = 8;   // counters of tokens lie on sectors of their own

struct alignas(kTileAlign) Shared {
  uint16_t x[kSteps][kTokens][kWidth];
  uint16_t W[kSteps][kLatents][kWidth];
  // Of the tile and of the one before, a copy a group: no group waits for the other.
  float bias[2][2][kLatents], scale[2][2][kLatents];
  Barrier loaded[kSteps], used[kSteps];
};
// Where the block's shared memory begins is not known to be aligned.
constexpr size_t kSharedBytes = sizeof(Shared) + kTileAlign;

struct Records {
  const void *bias, *scale;  // [F] of T, or null
  const int32_t* threshold;  // [R]: order of the K-th best so far
  float* scores;             // [R, records, 8]
  int32_t* columns;          // [R, records]: of the first score
  int32_t* recorded;         // [R, kApart]: the first of each
  int R, D, F, begin, end, records;
};

#if FASTSAE_HOPPER

constexpr uint32_t kStepBytes = sizeof(Shared::x[0]) + sizeof(Shared::W[0]);
constexpr int kBehind = 2;  // steps that the second group is behind the first

// NaN is above all.
__device__ __forceinline__ float larger(float a, float b) {
#ifdef FASTSAE_ON_HOST
  return a != a || b != b ? NAN : a > b ? a : b;
#else
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
#endif
}

// The score that a token's scores have to exceed; NaN, which all do, where none was seen yet.
__device__ __forceinline__ float bar_of(int32_t order) {
  if (order == INT32_MAX) return INFINITY;
  return bits_to_float(static_cast<uint32_t>(order ^ ((order >> 31) & INT32_MAX)));
}

// Tiles of one cluster in order: tokens inside latents, so that W passes once and x stays in L2.
struct Tiles {
  int tile, last, stride, rows, begin;
  __device__ Tiles(const Records& r)
      : tile(static_cast<int>(blockIdx.x) / kBlocks),
        stride(static_cast<int>(gridDim.x) / kBlocks),
        rows((r.R + kBlocks * kTokens - 1) / (kBlocks * kTokens)),
        begin(r.begin) {
    last = rows * ((r.end - r.begin + kLatents - 1) / kLatents);
  }
  __device__ bool left() const { return tile < last; }
  __device__ void next() { tile += stride; }
  __device__ int token() const { return (tile % rows) * kBlocks * kTokens; }
  __device__ int latent() const { return begin + tile / rows * kLatents; }
};

// A step's place in the ring, and the parity of that turn.
struct Ring {
  int at = 0;
  uint32_t turn = 0;
  __device__ void next() {
    if (++at == kSteps) {
      at = 0;
      turn ^= 1;
    }
  }
};

__device__ void load(const TileMap& x, const TileMap& W, const Records& r, Shared& s) {
  constexpr int kHalf = kLatents / kBlocks;
  const int rank = static_cast<int>(cluster_rank());
  Ring ring;
  for (Tiles tiles(r); tiles.left(); tiles.next()) {
    const int token = tiles.token() + rank * kTokens, latent = tiles.latent() + rank * kHalf;
    for (int d = 0; d < r.D; d += kWidth, ring.next()) {
      s.used[ring.at].wait(ring.turn ^ 1);
      s.loaded[ring.at].expect(kStepBytes);
      load_tile(x, s.x[ring.at], s.loaded[ring.at], token, d);
      load_tile(W, s.W[ring.at][rank * kHalf], s.loaded[ring.at], latent, d, (1 << kBlocks) - 1);
    }
  }
}

struct alignas(8) Two {
  float v[2];
};

// Adds the bias to acc and scales it, in place, and records.
template <bool kScale>
__device__ __forceinline__ void record(float (&acc)[128], const Records& r, const float* bias,
                                       const float* scale, int token, int latent,
                                       const float (&bar)[2]) {
  const int pair = 2 * (lane_id() % 4);
  uint32_t wanted[2] = {0, 0};
#pragma unroll
  for (int part = 0; part < 8; ++part) {
    float most[2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = 32 * part + 8 * j + pair;
      const Two add = *reinterpret_cast<const Two*>(bias + column);
      Two times{};
      if constexpr (kScale) times = *reinterpret_cast<const Two*>(scale + column);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          float& score = acc[16 * part + 4 * j + 2 * h + b];
          score += add.v[b];
          if constexpr (kScale) score *= times.v[b];
          most[h] = j + b == 0 ? score : larger(most[h], score);
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) wanted[h] |= static_cast<uint32_t>(!(most[h] <= bar[h])) << part;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (token + 8 * h >= r.R) wanted[h] = 0;
  }
  if (!__any_sync(kFullWarp, wanted[0] | wanted[1])) return;

  // Places for the four lanes that share two tokens: the low half counts the first's records.
  const uint32_t mine = __popc(wanted[0]) | __popc(wanted[1]) << 16;
  uint32_t upto = mine;
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {
    const uint32_t below = __shfl_up_sync(kFullWarp, upto, d);
    if (lane_id() % 4 >= d) upto += below;
  }
  const uint32_t all = __shfl_sync(kFullWarp, upto, lane_id() | 3);
  const int own = lane_id() % 4;  // lanes 0 and 1 of the four take places, each for one token
  const int count = own == 0 ? all & 0xffff : own == 1 ? all >> 16 : 0;
  int base = 0;
  if (count) base = atomicAdd(r.recorded + kApart * static_cast<int64_t>(token + 8 * own), count);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    int slot = __shfl_sync(kFullWarp, base, (lane_id() & ~3) + h);
    slot += (upto - mine) >> (16 * h) & 0xffff;
    const int64_t row = static_cast<int64_t>(token + 8 * h) * r.records;
#pragma unroll
    for (int part = 0; part < 8; ++part) {
      if (!(wanted[h] >> part & 1)) continue;
      if (slot < r.records) {
        r.columns[row + slot] = latent + 32 * part + pair;
        Pack<float>* to = reinterpret_cast<Pack<float>*>(r.scores + (row + slot) * kRecord);
        const float* from = acc + 16 * part + 2 * h;
        to[0] = {{from[0], from[1], from[4], from[5]}};
        to[1] = {{from[8], from[9], from[12], from[13]}};
      }
      ++slot;
    }
  }
}

template <class T, bool kScale>
__device__ void multiply_and_record(const Records& r, Shared& s, int group) {
  const int rank = static_cast<int>(cluster_rank());
  const int thread = static_cast<int>(threadIdx.x) % kGroup, warp = thread / kWarp;
  const int steps = (r.D + kWidth - 1) / kWidth;
  // The first group is at most kSteps ahead: with so many steps a tile, never two tiles.
  const bool staggered = steps > kBehind;
  const auto leave = [&](int at) {
    if (lane_id() < kBlocks) s.used[at].arrive(lane_id());
  };
  Ring ring;
  int copy = 0;
  for (Tiles tiles(r); tiles.left(); tiles.next(), copy ^= 1) {
    const int latent = tiles.latent();
    const int token = tiles.token() + rank * kTokens + group * 64 + warp * 16 + lane_id() / 4;
    // On their way while the products run: bias and scale of two latents, two thresholds.
    T bias[2] = {}, scale[2] = {};
    int32_t order[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = latent + thread + i * kGroup;
      if (r.bias != nullptr && at < r.F) bias[i] = static_cast<const T*>(r.bias)[at];
      if (kScale && at < r.F) scale[i] = static_cast<const T*>(r.scale)[at];
      if (token + 8 * i < r.R) order[i] = r.threshold[token + 8 * i];
    }

    float acc[128];
    int before = 0;
    if (staggered && group == 1) sync_at(3, 2 * kGroup);
    for (int step = 0; step < steps; ++step) {
      s.loaded[ring.at].wait(ring.turn);
      if (staggered && group == 0 && step == kBehind) arrive_at(3, 2 * kGroup);
      const uint64_t x = product_operand(shared_address(s.x[ring.at][group * 64]));
      const uint64_t W = product_operand(shared_address(s.W[ring.at]));
      fence_products();
#pragma unroll
      for (int k = 0; k < kWidth / 16; ++k) {
        multiply<T>(acc, x + k * kOperand16, W + k * kOperand16, step + k > 0);
      }
      commit_products();
      wait_products<1>(acc);
      if (step > 0) leave(before);
      before = ring.at;
      ring.next();
    }
    wait_products<0>(acc);
    leave(before);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      s.bias[group][copy][thread + i * kGroup] = widen(bias[i]);
      if constexpr (kScale) s.scale[group][copy][thread + i * kGroup] = widen(scale[i]);
    }
    sync_at(1 + group, kGroup);
    const float bar[2] = {bar_of(order[0]), bar_of(order[1])};
    record<kScale>(acc, r, s.bias[group][copy], s.scale[group][copy], token, latent, bar);
  }
}

#endif  // FASTSAE_HOPPER

template <class T, bool kScale>
__global__ void __launch_bounds__(kThreads, 1)
    record_tiles(const __grid_constant__ TileMap x, const __grid_constant__ TileMap W,
                 const Records r) {
#if FASTSAE_HOPPER
  unsigned char* bytes = &dynamic_shared<unsigned char>();
  bytes += (kTileAlign - shared_address(bytes) % kTileAlign) % kTileAlign;
  Shared& s = *reinterpret_cast<Shared*>(bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSteps; ++i) {
      s.loaded[i].init(1);
      s.used[i].init(kBlocks * 2 * kGroup / kWarp);  // every warp that multiplies, of both blocks
    }
  }
  cluster_sync();
  const int group = static_cast<int>(threadIdx.x) / kGroup;
  if (group == 2) {
    keep_registers<40>();
    if (threadIdx.x == 2 * kGroup) load(x, W, r, s);
    __syncwarp();
  } else {
    keep_registers<232>();
    multiply_and_record<T, kScale>(r, s, group);
  }
  cluster_sync();  // the other block may still arrive here
#endif
}

void topk_encode_record(const Tensor& x, const Tensor& W_enc, const std::optional<Tensor>& b_enc,
                        const std::optional<Tensor>& rank_scale, const Tensor& threshold,
                        int64_t begin, int64_t end, Tensor scores, Tensor columns,
                        Tensor recorded) {
  const int64_t R = x.size(0), D = x.size(1), F = W_enc.size(0), records = columns.size(1);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, kOp,
                  ": the fused product takes bfloat16 and float16");
  check_tensor(kOp, "x", x, x, {R, D}, dtype);
  check_tensor(kOp, "W_enc", W_enc, x, {F, D}, dtype);
  if (b_enc) check_tensor(kOp, "b_enc", *b_enc, x, {F}, dtype);
  if (rank_scale) check_tensor(kOp, "rank_scale", *rank_scale, x, {F}, dtype);
  check_tensor(kOp, "threshold", threshold, x, {R}, ScalarType::Int);
  check_tensor(kOp, "scores", scores, x, {R, records, kRecord}, ScalarType::Float);
  check_tensor(kOp, "columns", columns, x, {R, records}, ScalarType::Int);
  check_tensor(kOp, "recorded", recorded, x, {R, kApart}, ScalarType::Int);
  const auto aligned = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  };
  STD_TORCH_CHECK(D % 8 == 0 && aligned(x) && aligned(W_enc), kOp,
                  ": the fused product needs rows on 16 bytes");
  STD_TORCH_CHECK(0 <= begin && begin <= end && end <= F && F <= INT32_MAX - kLatents && D > 0 &&
                      D <= INT32_MAX - kWidth && R <= INT32_MAX - kBlocks * kTokens,
                  kOp, ": columns ", begin, " to ", end, " of ", F, " for ", R, " tokens");
  const int64_t tiles = ceil_div(R, kBlocks * kTokens) * ceil_div(end - begin, kLatents);
  if (tiles == 0) return;
  STD_TORCH_CHECK(tiles <= INT32_MAX / 2, kOp, ": ", tiles, " tiles are too many");

  const Queue queue(x);
  const bool is_bf16 = dtype == ScalarType::BFloat16;
  const TileMap x_map = tile_map(x.const_data_ptr(), is_bf16, R, D, kTokens);
  const TileMap W_map = tile_map(W_enc.const_data_ptr(), is_bf16, F, D, kLatents / kBlocks);
  const Records r{b_enc ? b_enc->const_data_ptr() : nullptr,
                  rank_scale ? rank_scale->const_data_ptr() : nullptr,
                  data<int32_t>(threshold),
                  mutable_data<float>(scores),
                  mutable_data<int32_t>(columns),
                  mutable_data<int32_t>(recorded),
                  static_cast<int>(R),
                  static_cast<int>(D),
                  static_cast<int>(F),
                  static_cast<int>(begin),
                  static_cast<int>(end),
                  static_cast<int>(records)};
  const auto launch = [&](auto kernel) {
    queue.launch_clusters(kernel, tiles, kBlocks, kThreads, kSharedBytes, x_map, W_map, r);
  };
  if (is_bf16)
    return rank_scale ? launch(record_tiles<bf16, true>) : launch(record_tiles<bf16, false>);
  return rank_scale ? launch(record_tiles<fp16, true>) : launch(record_tiles<fp16, false>);
}

}  // namespace
}  // namespace cuda
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, FASTSAE_CUDA_KEY, m) {
  m.impl("topk_encode_record_cuda", TORCH_BOX(&fastsae::cuda::topk_encode_record));
}
