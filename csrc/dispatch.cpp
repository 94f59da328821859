// Chooses the variant once per process, by cpuid.
#include <string>

#include "solvers.h"

namespace lmc {

template <class T>
const Solvers<T>* solvers(const char* isa) {
    const std::string wanted = isa ? isa : "";
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    if (has_avx512 && (wanted.empty() || wanted == "avx512")) return &avx512::table<T>();
    if (has_avx2 && (wanted.empty() || wanted == "avx2")) return &avx2::table<T>();
#endif
    return wanted.empty() || wanted == "generic" ? &generic::table<T>() : nullptr;
}
template const Solvers<float>* solvers<float>(const char*);
template const Solvers<double>* solvers<double>(const char*);

}  // namespace lmc
