// The passes of fused.h on a GPU, a launch for all tensors of a group; compiled by cuda.py.
//
// Block b has THREADS threads and moves CHUNK elements of one tensor: the last whose `chunks_before` are at most b.

#include "fused.h"

namespace {

// What the threads of a block share: the pass over their tensor, made by one of them, and their part of it.
template <class Pass>
struct Share {
  Pass pass;
  int64_t begin, end;
  Share(const Group& group, const Row& row)
      : pass(group, row),
        begin((blockIdx.x - row.chunks_before) * CHUNK),
        end(at_most(begin + CHUNK, row.size)) {}
};

inline const Row& row_of_block(const Group& group) {
  int64_t low = 0, high = group.num;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (rows(group)[middle].chunks_before <= blockIdx.x ? low : high) = middle;
  }
  return rows(group)[low];
}

template <class Pass>
inline void run(const Group& group) {
  alignas(Share<Pass>) __shared__ unsigned char room[sizeof(Share<Pass>)];
  Share<Pass>* const shared = reinterpret_cast<Share<Pass>*>(room);
  if (threadIdx.x == 0) *shared = Share<Pass>(group, row_of_block(group));
  __syncthreads();
  const Share<Pass> share = *shared;
  for (int64_t i = share.begin + threadIdx.x; i < share.end; i += THREADS) share.pass(i);
}

}  // namespace

#define EXPORT(NAME, ...) \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME(const Group* group) { run<__VA_ARGS__>(*group); }
EXPORT_ALL
