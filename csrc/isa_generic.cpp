// Whatever the compiler assumes by default: SSE2 on x86-64, NEON on AArch64.
#include "solvers.h"

#define ISA_NAME "generic"
#define VECTOR_BYTES 16
#define TILE_ROWS 2
#define TILE_VECTORS 4

namespace lmc::generic {
#include "simd.h"
#include "cayley.h"
#include "expm.h"
#include "variant.h"
}  // namespace lmc::generic
