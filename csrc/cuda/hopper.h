// What sm_90a has beyond SIMT: clusters, asynchronous tile loads, barriers that count bytes, tensor
// cores that a group of four warps feeds from shared memory.
//
// With FASTSAE_ON_HOST all of it is emulated by tests/support/hopper_on_host.h. Where
// FASTSAE_HOPPER is 0, for other architectures, kernels that need it must be empty.
#pragma once

#include <type_traits>

#include "cuda/device.h"

#ifdef FASTSAE_ON_HOST
#include "hopper_on_host.h"
#define FASTSAE_HOPPER 1
#else
#include <cuda.h>
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FASTSAE_HOPPER 1
#else
#define FASTSAE_HOPPER 0
#endif
#endif

namespace fastsae {
namespace cuda {

constexpr int kGroup = 128;       // threads that feed the tensor cores together
constexpr int kTileBytes = 128;   // of a tile's row: the width of the widest swizzle
constexpr int kTileAlign = 1024;  // 8 rows: after these the swizzle repeats

#ifdef FASTSAE_ON_HOST
using hopper_on_host::arrive_at;
using hopper_on_host::Barrier;
using hopper_on_host::cluster_rank;
using hopper_on_host::cluster_sync;
using hopper_on_host::commit_products;
using hopper_on_host::fence_products;
using hopper_on_host::keep_registers;
using hopper_on_host::load_tile;
using hopper_on_host::multiply;
using hopper_on_host::shared_address;
using hopper_on_host::sync_at;
using hopper_on_host::tile_map;
using hopper_on_host::TileMap;
using hopper_on_host::wait_products;
#else

using TileMap = CUtensorMap;

// A matrix [rows, columns] of 2-byte elements, read in tiles of box_rows x 64; 0 outside. Needs a
// base and rows on 16 bytes. Host.
inline TileMap tile_map(const void* base, bool bf16, int64_t rows, int64_t columns, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                    cudaEnableDefault, &found));
#else  // CUDA 13 has only the other
    STD_CUDA_CHECK(
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found));
#endif
    STD_TORCH_CHECK(entry != nullptr, "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(entry);
  }();
  TileMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * columns)};
  const cuuint32_t box[] = {kTileBytes / 2, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(&map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "no tile map for a matrix of ", rows, " x ", columns,
                  ": driver error ", static_cast<int>(result));
  return map;
}

// An address in the shared memory of this block.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster; what they wrote to shared memory before is seen after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// A barrier in shared memory, whose phase ends when `arrivals` came and all bytes expected landed.
// It orders loads of tiles and products, not what threads themselves write and read in another
// block: that would take a fence of all memory for every arrival.
struct Barrier {
  uint64_t state;

  // One thread, before cluster_sync.
  __device__ __forceinline__ void init(uint32_t arrivals) {
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], %1;\nfence.mbarrier_init.release.cluster;" ::"r"(
            shared_address(this)),
        "r"(arrivals)
        : "memory");
  }
  // Arrives, and lets the phase wait for so many bytes of load_tile.
  __device__ __forceinline__ void expect(uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
        "r"(bytes)
        : "memory");
  }
  // Arrives at the barrier of the same place in a block of the cluster.
  __device__ __forceinline__ void arrive(uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(this)),
        "r"(rank)
        : "memory");
  }
  // Until the phase of this parity is over; one that has not begun counts as such with parity 1.
  __device__ __forceinline__ void wait(uint32_t parity) {
    asm volatile(
        "{\n.reg .pred over;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@!over bra again;\n}" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }
};

// The tile whose first element is (row, column), to `to` of every block of the cluster whose bit is
// set in `blocks`; its bytes count for the barrier at the same place of each. One thread. Rows of
// 128 bytes follow each other; in each the 16-byte pieces are swizzled by the row.
__device__ __forceinline__ void load_tile(const TileMap& map, void* to, Barrier& barrier, int row,
                                          int column, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}
// The same, to this block alone.
__device__ __forceinline__ void load_tile(const TileMap& map, void* to, Barrier& barrier, int row,
                                          int column) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row)
      : "memory");
}

// Barriers 1 to 15 of a block: `threads` of it arrive, those of sync_at also wait.
__device__ __forceinline__ void sync_at(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive_at(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Registers a thread of this group keeps from here on. 240: takes what another group gave back.
template <int kRegisters>
__device__ __forceinline__ void keep_registers() {
  if constexpr (kRegisters > 168) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }
}

// Before the first product after acc was touched.
__device__ __forceinline__ void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Until at most kPending batches of products of this group go on; then acc may be touched.
template <int kPending>
__device__ __forceinline__ void wait_products(float (&acc)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(acc[i])::"memory");
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

#define FASTSAE_ACC4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define FASTSAE_ACC32(i)                                                           \
  FASTSAE_ACC4(i), FASTSAE_ACC4(i + 4), FASTSAE_ACC4(i + 8), FASTSAE_ACC4(i + 12), \
      FASTSAE_ACC4(i + 16), FASTSAE_ACC4(i + 20), FASTSAE_ACC4(i + 24), FASTSAE_ACC4(i + 28)
#define FASTSAE_WGMMA(type)                                                                       \
  asm volatile(                                                                                   \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"                                           \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "   \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "     \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "     \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "     \
      "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "     \
      "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, " \
      "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118," \
      " %119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, add, 1, 1, 0, 0;\n}"   \
      : FASTSAE_ACC32(0), FASTSAE_ACC32(32), FASTSAE_ACC32(64), FASTSAE_ACC32(96)                 \
      : "l"(a), "l"(b), "r"(add))

// acc (+)= A B^T on the tensor cores, A 64 x 16 and B 256 x 16 of T, summed in fp32; a and b: their
// product_operand. Asynchronous: see wait_products. A lane of the group's warp w holds
// acc[4 j + 2 h + b]: row 16 w + lane / 4 + 8 h of A, row 8 j + 2 (lane % 4) + b of B.
template <class T>
__device__ __forceinline__ void multiply(float (&acc)[128], uint64_t a, uint64_t b, int add) {
  if constexpr (std::is_same_v<T, bf16>) {
    FASTSAE_WGMMA("bf16");
  } else {
    FASTSAE_WGMMA("f16");
  }
}
// Ends a batch.
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

#endif  // FASTSAE_ON_HOST

// How the tensor cores are told where a tile of 128-byte swizzled rows is: address and the distance
// of 8 rows in units of 16 bytes.
__host__ __device__ constexpr uint64_t product_operand(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1, kRows8 = 8 * kTileBytes;
  return kSwizzle128 << 62 | (kRows8 >> 4) << 32 | (address & 0x3ffff) >> 4;
}
constexpr uint64_t kOperand16 = 2;  // added to it: the tile 16 columns further on

}  // namespace cuda
}  // namespace fastsae
