#include "solvers.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#pragma GCC target("avx2,fma")

#define ISA_NAME "avx2"
#define VECTOR_BYTES 32
#define TILE_ROWS 4
#define TILE_VECTORS 2

namespace lmc::avx2 {
#include "simd.h"
#include "cayley.h"
#include "expm.h"
#include "variant.h"
}  // namespace lmc::avx2

#endif
