// The passes of fused.h on a CPU, with OpenMP's threads; compiled by native.py.

#include "fused.h"

namespace {

template <class Pass>
void run(const Group& group, int num_threads) {
#pragma omp parallel num_threads(num_threads)
  for (int64_t t = 0; t < group.num; ++t) {
    const Pass pass(group, rows(group)[t]);
    const int64_t size = rows(group)[t].size;
#pragma omp for simd nowait schedule(static)
    for (int64_t i = 0; i < size; ++i) pass(i);
  }
}

}  // namespace

#define EXPORT(NAME, ...) \
  extern "C" void NAME(const Group* group, int num_threads) { run<__VA_ARGS__>(*group, num_threads); }
EXPORT_ALL
