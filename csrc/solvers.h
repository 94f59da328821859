// What the instruction-set variants offer: functions on one matrix. Batches and threads are the caller's.
#pragma once

namespace lmc {

// A polynomial of taylor.py: product k multiplies two combinations of P = [I, A, P2, ...].
struct Scheme {
    static constexpr int max_products = 5;
    static constexpr int max_terms = max_products + 2;
    int products;
    double theta32, theta64;
    double left[max_products][max_terms], right[max_products][max_terms], result[max_terms];
};

struct Schemes {
    static constexpr int max_count = 8;
    int count;
    Scheme at[max_count];
};

struct Plan {
    int scheme, squarings;
};

enum Status : int { ok = 0, refused = 1, too_large = 2, overflow = 3 };

// What the caller needs next: `lines` cache lines from each address, fetched between register tiles.
struct Ahead {
    const void* from[3];
    int addresses;
    long lines, line = 0;
};

// Threads for the inside of one matrix: run(count, threads, task, data) calls task(data, i, worker) for i in [0, count).
// A plain function, so that code compiled for one instruction set shares no template with the rest.
struct Team {
    int threads = 1;
    void (*run)(long count, int threads, void (*task)(void*, long, int), void* data) = nullptr;
    Ahead* ahead = nullptr;  // for one thread only
};

// n is the matrix size, matrices are row-major and dense; `work` holds the number of T that the matching *_work says and
// is aligned to 64 bytes. The tape of expm holds `expm_tape` numbers. `more`: another matrix lies right behind this one.
template <class T>
struct Solvers {
    const char* isa;
    long (*cayley_work)(long n, int threads);
    Status (*cayley_forward)(const Team&, const T* X, T* Q, long n, T* work, bool more);  // refused: X is not skew, or not finite
    void (*cayley_backward)(const Team&, const T* Q, const T* G, T* X_bar, long n, T* work, bool more);
    long (*expm_work)(long n, int threads);
    long (*expm_tape)(long n, int squarings);
    T (*one_norm)(const T* X, long n, T* work);
    Status (*expm_forward)(const Team&, const Schemes&, const T* X, T* E, long n, T* tape, Plan*, T* work);  // tape may be null
    void (*expm_backward)(const Team&, const Schemes&, const T* X, const T* tape, const T* G, T* X_bar, long n, Plan, T* work);
};

// The best variant this processor runs, or the named one ("generic", "avx2", "avx512"); null where it cannot run.
template <class T>
const Solvers<T>* solvers(const char* isa = nullptr);

namespace generic {
template <class T> const Solvers<T>& table();
}
namespace avx2 {
template <class T> const Solvers<T>& table();
}
namespace avx512 {
template <class T> const Solvers<T>& table();
}

}  // namespace lmc
