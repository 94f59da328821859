#include "solvers.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")

#define ISA_NAME "avx512"
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#define TILE_VECTORS 2

namespace lmc::avx512 {
#include "simd.h"
#include "cayley.h"
#include "expm.h"
#include "variant.h"
}  // namespace lmc::avx512

#endif
