// Matrix product and element-wise passes in compiler vector extensions. Included once per instruction set, inside its own
// namespace, with VECTOR_BYTES, TILE_ROWS and TILE_VECTORS set. No std templates here: the linker would be free to keep
// the copy compiled for the wrong instruction set.
//
// All matrices in scratch are padded with zeros to a multiple of 64 bytes a row (and as many rows), so no product has an
// edge case.

typedef float F32 __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef double F64 __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
typedef float F32x4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef double F64x4 __attribute__((vector_size(32), aligned(8), may_alias));

template <class T> struct Lanes;
template <> struct Lanes<float> {
    typedef F32 V;
    typedef F32x4 V4;
    typedef int Bit;
    typedef Bit Bits __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
    typedef Bit Mask4 __attribute__((vector_size(16)));
};
template <> struct Lanes<double> {
    typedef F64 V;
    typedef F64x4 V4;
    typedef long long Bit;
    typedef Bit Bits __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
    typedef Bit Mask4 __attribute__((vector_size(32)));
};
template <class T> using Vec = typename Lanes<T>::V;
template <class T> constexpr long lanes = VECTOR_BYTES / sizeof(T);

template <class T> constexpr long unit = 64 / sizeof(T);
template <class T> static inline long padded(long n) { return (n + unit<T> - 1) / unit<T> * unit<T>; }

template <class T> static inline Vec<T> load(const T* p) { return *reinterpret_cast<const Vec<T>*>(p); }
template <class T> static inline void store(T* p, Vec<T> v) { *reinterpret_cast<Vec<T>*>(p) = v; }
template <class T> static inline typename Lanes<T>::V4 load4(const T* p) {
    return *reinterpret_cast<const typename Lanes<T>::V4*>(p);
}

// Lane `lane` of v in every lane.
template <class T> static inline Vec<T> broadcast_lane(Vec<T> v, int lane) {
    return __builtin_shuffle(v, typename Lanes<T>::Bit(lane) - typename Lanes<T>::Bits{});
}

template <class T> static inline void copy_vectors(long count, const T* from, T* to) {
    for (long i = 0; i < count; i += lanes<T>) store(to + i, load(from + i));
}

enum class Into { set, add, subtract };

// One register tile of C = A B, C = D + A B or C = D - A B; D is laid out as C.
template <class T, int rows, int vectors, Into into>
static inline __attribute__((always_inline)) void tile(long k, const T* a, long lda, const T* b, long ldb, const T* d, T* c, long ldc) {
    Vec<T> sum[rows][vectors];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) sum[i][j] = Vec<T>{};
    for (long p = 0; p < k; ++p, b += ldb) {
        Vec<T> row[vectors];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) row[j] = load(b + j * lanes<T>);
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < vectors; ++j) sum[i][j] += a[i * lda + p] * row[j];
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) {
            const long at = i * ldc + j * lanes<T>;
            if (into == Into::set) store(c + at, sum[i][j]);
            if (into == Into::add) store(c + at, load(d + at) + sum[i][j]);
            if (into == Into::subtract) store(c + at, load(d + at) - sum[i][j]);
        }
}

static inline long least(long a, long b) { return a < b ? a : b; }
static inline long most(long a, long b) { return a > b ? a : b; }

constexpr Into further(Into into) { return into == Into::set ? Into::add : into; }

// Products summed before they are added to C: rounding grows with the length of a sum, so long ones are cut. The tile of C
// stays in the first-level cache meanwhile.
constexpr long sum_length = 128;

template <class T, int rows, int vectors, Into into>
static inline void long_tile(long k, const T* a, long lda, const T* b, long ldb, const T* d, T* c, long ldc) {
    tile<T, rows, vectors, into>(least(k, sum_length), a, lda, b, ldb, d, c, ldc);
    for (long p = sum_length; p < k; p += sum_length)
        tile<T, rows, vectors, further(into)>(least(k - p, sum_length), a + p, lda, b + p * ldb, ldb, c, c, ldc);
}

// Products leave the way to memory idle: meanwhile this fills the second-level cache, one line for each line of a tile.
static inline void fetch(Ahead* ahead) {
    if (!ahead) return;
    const long end = least(ahead->line + TILE_ROWS * TILE_VECTORS * VECTOR_BYTES / 64, ahead->lines);
    for (; ahead->line < end; ++ahead->line)
        for (int i = 0; i < ahead->addresses; ++i)
            __builtin_prefetch(static_cast<const char*>(ahead->from[i]) + 64 * ahead->line, 0, 2);
}

template <class T, int vectors, Into into>
static inline void column_panel(long m, long k, const T* A, long lda, const T* b, long ldb, const T* D, T* C, long ldc, Ahead* ahead) {
    long i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS) {
        long_tile<T, TILE_ROWS, vectors, into>(k, A + i * lda, lda, b, ldb, D + i * ldc, C + i * ldc, ldc);
        fetch(ahead);
    }
    for (; i < m; i += 2) long_tile<T, 2, vectors, into>(k, A + i * lda, lda, b, ldb, D + i * ldc, C + i * ldc, ldc);
}

// Blocks of a large product: B in pieces of `deep` rows by `across` columns, 512 KB, which the second-level cache holds.
template <class T> constexpr long deep = 2048 / sizeof(T);
template <class T> constexpr long across = 1024 / sizeof(T);
constexpr long block_rows = 64;

// Numbers that `multiply` packs B into, for each thread of the team.
template <class T> static inline long pack_size(long n, long k) { return least(k, deep<T>) * least(n, across<T>); }

template <class T>
struct Product {
    long m, n, k;
    const T* A;
    long lda;
    const T* B;
    long ldb;
    const T* D;
    T* C;
    long ldc;
    T* pack;
    bool lower;
    Ahead* ahead;
};

// The columns of one block of B, over all rows: what one thread of a team does at a time.
template <class T, Into into>
static void multiply_columns(const Product<T>& g, long j0, T* pack) {
    constexpr long wide = TILE_VECTORS * lanes<T>;
    // Panels of a wide B fall on few cache sets, unless all of B fits; a contiguous copy does not.
    const long bytes = g.ldb * sizeof(T);
    const bool copy = bytes > 256 && bytes * g.k > 16384 && g.m > 2 * TILE_ROWS;
    const long j1 = least(j0 + across<T>, g.n);
    for (long p0 = 0; p0 < g.k; p0 += deep<T>) {
        const long k = least(g.k - p0, deep<T>);
        if (copy)
            for (long j = j0, width; j < j1; j += width) {
                width = j + wide <= j1 ? wide : unit<T>;
                T* to = pack + (j - j0) * k;
                for (long p = 0; p < k; ++p)
                    for (long q = 0; q < width; q += lanes<T>) store(to + p * width + q, load(g.B + (p0 + p) * g.ldb + j + q));
            }
        const long rows = g.m * g.k > 128 * 1024 ? block_rows : g.m;
        for (long i0 = 0; i0 < g.m; i0 += rows)
            for (long j = j0, width; j < j1; j += width) {
                width = j + wide <= j1 ? wide : unit<T>;
                const long i = g.lower ? most(i0, j / TILE_ROWS * TILE_ROWS) : i0, m = least(i0 + rows, g.m) - i;
                if (m <= 0) continue;
                const T* a = g.A + i * g.lda + p0;
                const T* b = copy ? pack + (j - j0) * k : g.B + p0 * g.ldb + j;
                const long ldb = copy ? width : g.ldb;
                T* c = g.C + i * g.ldc + j;
                const T* d = p0 == 0 ? g.D + i * g.ldc + j : c;
                constexpr Into next = further(into);
                constexpr int narrow = unit<T> / lanes<T>;
                if (p0 == 0 && width == wide)
                    column_panel<T, TILE_VECTORS, into>(m, k, a, g.lda, b, ldb, d, c, g.ldc, g.ahead);
                else if (p0 == 0)
                    column_panel<T, narrow, into>(m, k, a, g.lda, b, ldb, d, c, g.ldc, g.ahead);
                else if (width == wide)
                    column_panel<T, TILE_VECTORS, next>(m, k, a, g.lda, b, ldb, d, c, g.ldc, g.ahead);
                else
                    column_panel<T, narrow, next>(m, k, a, g.lda, b, ldb, d, c, g.ldc, g.ahead);
            }
    }
}

template <class T, Into into>
static void multiply_task(void* product, long block, int worker) {
    const Product<T>& g = *static_cast<Product<T>*>(product);
    multiply_columns<T, into>(g, block * across<T>, g.pack + worker * pack_size<T>(g.n, g.k));
}

// C = A B, C = D + A B or C = D - A B, (m, k) x (k, n); D, with rows as long as C's, is C where not given. `pack` holds pack_size numbers for each thread. With `lower`, entries above the
// diagonal are skipped, give or take a tile. The order of every sum is the same for any number of threads.
template <class T, Into into = Into::set>
static void multiply(const Team& team, long m, long n, long k, const T* A, long lda, const T* B, long ldb, T* C, long ldc,
                     T* pack, bool lower = false, const T* D = nullptr) {
    Product<T> g{m, n, k, A, lda, B, ldb, D ? D : C, C, ldc, pack, lower, team.ahead};
    if (team.threads > 1 && double(m) * n * k > 4e6) return team.run((n + across<T> - 1) / across<T>, team.threads, multiply_task<T, into>, &g);
    for (long j = 0; j < n; j += across<T>) multiply_columns<T, into>(g, j, pack);
}

// The 4 x 4 block at `from`, transposed.
template <class T>
static inline void transpose4(const T* from, long ld, typename Lanes<T>::V4 out[4]) {
    typedef typename Lanes<T>::Mask4 M;
    const auto r0 = load4(from), r1 = load4(from + ld), r2 = load4(from + 2 * ld), r3 = load4(from + 3 * ld);
    const auto a = __builtin_shuffle(r0, r1, M{0, 4, 1, 5}), b = __builtin_shuffle(r2, r3, M{0, 4, 1, 5});
    const auto c = __builtin_shuffle(r0, r1, M{2, 6, 3, 7}), d = __builtin_shuffle(r2, r3, M{2, 6, 3, 7});
    out[0] = __builtin_shuffle(a, b, M{0, 1, 4, 5});
    out[1] = __builtin_shuffle(a, b, M{2, 3, 6, 7});
    out[2] = __builtin_shuffle(c, d, M{0, 1, 4, 5});
    out[3] = __builtin_shuffle(c, d, M{2, 3, 6, 7});
}

// to = scale fromᵀ for the leading n x n part.
template <class T>
static void transpose(long n, const T* from, long ld_from, T* to, long ld_to, T scale) {
    const long even = n / 4 * 4;
    for (long i0 = 0; i0 < even; i0 += unit<T>)  // whole cache lines of `from`
        for (long j = 0; j < even; j += 4)
            for (long i = i0; i < least(i0 + unit<T>, even); i += 4) {
                typename Lanes<T>::V4 rows[4];
                transpose4(from + j * ld_from + i, ld_from, rows);
                for (int r = 0; r < 4; ++r)
                    *reinterpret_cast<typename Lanes<T>::V4*>(to + (i + r) * ld_to + j) = scale * rows[r];
            }
    for (long i = 0; i < n; ++i)
        for (long j = i < even ? even : 0; j < n; ++j) to[i * ld_to + j] = scale * from[j * ld_from + i];
}

// Fills the strict upper triangle (in blocks of 4) from the lower one: A_ji = sign A_ij.
template <class T>
static void mirror(long n, T* A, T sign) {
    for (long i = 0; i < n; i += 4)
        for (long j = 0; j < i; j += 4) {
            typename Lanes<T>::V4 rows[4];
            transpose4(A + i * n + j, n, rows);
            for (int r = 0; r < 4; ++r)
                *reinterpret_cast<typename Lanes<T>::V4*>(A + (j + r) * n + i) = sign * rows[r];
        }
}

// 1 for a symmetric matrix, -1 for a skew one (zero included), 0 for neither. With an infinity or a NaN it is neither:
// then the sum or difference of the pair is NaN, which differs from 0.
template <class T, bool may_be_symmetric = true>
static int parity(long n, const T* A) {
    typedef typename Lanes<T>::Mask4 M;
    M not_skew{}, not_symmetric{};  // bits of the sums and differences
    for (long i = 0; i < n; i += 4)
        for (long j = 0; j <= i; j += 4) {
            typename Lanes<T>::V4 rows[4];
            transpose4(A + j * n + i, n, rows);
            for (int r = 0; r < 4; ++r) {
                const auto mine = load4(A + (i + r) * n + j);
                not_skew |= (M)(mine + rows[r]);
                if (may_be_symmetric) not_symmetric |= (M)(mine - rows[r]);
            }
        }
    bool skew = true, symmetric = may_be_symmetric;
    for (int r = 0; r < 4; ++r) {
        skew &= (not_skew[r] << 1) == 0;  // the sign of a zero does not count
        symmetric &= (not_symmetric[r] << 1) == 0;
    }
    return skew ? -1 : symmetric ? 1 : 0;
}

template <class T>
static inline void fill(T* to, long count, T value) {
    for (long i = 0; i < count; ++i) to[i] = value;
}

// to (padded) = scale from (n x n), zero beyond.
template <class T>
static void load_padded(long n, const T* from, T* to, long np, T scale) {
    for (long i = 0; i < n; ++i) {
        long j = 0;
        for (; j + lanes<T> <= n; j += lanes<T>) store(to + i * np + j, scale * load(from + i * n + j));
        for (; j < n; ++j) to[i * np + j] = scale * from[i * n + j];
        fill(to + i * np + n, np - n, T(0));
    }
    fill(to + n * np, (np - n) * np, T(0));
}

template <class T> static inline T sum_lanes(Vec<T> v) {
    typename Lanes<T>::Bits order;
#pragma GCC unroll 16
    for (long i = 0; i < lanes<T>; ++i) order[i] = i;
#pragma GCC unroll 4
    for (long half = lanes<T> / 2; half > 0; half /= 2) v += __builtin_shuffle(v, order ^ typename Lanes<T>::Bit(half));
    return v[0];
}

// to (n x n) = from (padded); false where an entry is not finite.
template <class T>
static bool store_unpadded(long n, const T* from, long np, T* to) {
    Vec<T> zeros{};
    T zero = 0;
    for (long i = 0; i < n; ++i) {
        const T* row = from + i * np;
        long j = 0;
        for (; j + lanes<T> <= n; j += lanes<T>) {
            store(to + i * n + j, load(row + j));
            zeros += load(row + j) * T(0);
        }
        for (; j < n; ++j) {
            to[i * n + j] = row[j];
            zero += row[j] * 0;
        }
    }
    return zero + sum_lanes<T>(zeros) == 0;
}
