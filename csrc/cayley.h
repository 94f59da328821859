// Cayley map of one skew matrix: block Gauss-Jordan without pivoting. Included once per instruction set, after simd.h.

// D <- D^-1, size x size, by Gauss-Jordan steps in registers where they suffice. No pivoting: the symmetric part is
// positive definite.
template <class T, int size>
static void invert_small(T* D, long ld) {
    typedef typename Lanes<T>::Bits Bits;
    constexpr int vectors = size / lanes<T>;
    static_assert(vectors * lanes<T> == size, "whole vectors");
    // Windows of these, starting k before the middle, are unit vector k and the mask of all other columns.
    T unit_vectors[2 * size] = {};
    typename Lanes<T>::Bit others[2 * size];
    for (int i = 0; i < 2 * size; ++i) others[i] = i == size ? 0 : -1;
    unit_vectors[size] = 1;
    Vec<T> row[size][vectors];
#pragma GCC unroll 16
    for (int i = 0; i < size; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) row[i][v] = load(D + i * ld + v * lanes<T>);
#pragma GCC unroll 16
    for (int k = 0; k < size; ++k) {
        Bits keep[vectors];
        const Vec<T> inverse = T(1) / broadcast_lane<T>(row[k][k / lanes<T>], k % lanes<T>);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            keep[v] = *reinterpret_cast<const Bits*>(others + size - k + v * lanes<T>);
            row[k][v] = ((Vec<T>)((Bits)row[k][v] & keep[v]) + load(unit_vectors + size - k + v * lanes<T>)) * inverse;
        }
#pragma GCC unroll 16
        for (int i = 0; i < size; ++i) {
            if (i == k) continue;
            const Vec<T> factor = broadcast_lane<T>(row[i][k / lanes<T>], k % lanes<T>);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) row[i][v] = (Vec<T>)((Bits)row[i][v] & keep[v]) - factor * row[k][v];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < size; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) store(D + i * ld + v * lanes<T>, row[i][v]);
}

static inline long block_size(long n) { return n <= 16 ? n : n <= 64 ? 16 : n < 512 ? 32 : n < 1024 ? 64 : n < 2048 ? 128 : 256; }

// Numbers of scratch that `invert` needs for an n x n matrix: D, C, R and the packed panel, and again for D.
template <class T>
static long invert_work(long n, int threads) {
    if (n <= 16) return 0;
    const long b = block_size(n);
    return b * b + 2 * n * b + threads * pack_size<T>(n, b) + invert_work<T>(b, 1);
}

// A <- A^-1, n a multiple of unit<T>. 2 n^3 flops, all but O(n^2 b) of them in `multiply`.
template <class T>
static void invert(const Team& team, long n, T* A, long lda, T* work) {
    if (n == 16) return invert_small<T, 16>(A, lda);
    if constexpr (unit<T> == 8)
        if (n == 8) return invert_small<T, 8>(A, lda);
    const long full = block_size(n);
    T* D = work;
    T* C = D + full * full;
    T* R = C + n * full;
    T* pack = R + n * full;
    T* deeper = pack + team.threads * pack_size<T>(n, full);
    for (long k = 0; k < n; k += full) {
        const long b = least(n - k, full);
        // The block column becomes zero, so that the update below writes the inverse in its place.
        for (long i = 0; i < n; ++i)
            for (long j = 0; j < b; j += lanes<T>) {
                store(C + i * b + j, load(A + i * lda + k + j));
                store(A + i * lda + k + j, Vec<T>{});
            }
        copy_vectors(b * b, C + k * b, D);
        invert(Team{}, b, D, b, deeper);
        const T* row = A + k * lda;
        const long after = k + b;
        multiply<T>(team, b, k, b, D, b, row, lda, R, n, pack);
        multiply<T>(team, b, n - after, b, D, b, row + after, lda, R + after, n, pack);
        for (long i = 0; i < b; ++i) copy_vectors(b, D + i * b, R + i * n + k);
        multiply<T, Into::subtract>(team, k, n, b, C, b, R, n, A, lda, pack);
        multiply<T, Into::subtract>(team, n - after, n, b, C + after * b, b, R, n, A + after * lda, lda, pack);
        for (long i = 0; i < b; ++i) copy_vectors(n, R + i * n, A + (k + i) * lda);
    }
}

template <class T>
static long cayley_work(long n, int threads) {
    const long np = padded<T>(n);
    return np * np + most(invert_work<T>(np, threads), 2 * np * np + threads * pack_size<T>(np, np));
}

// The largest squared 2-norm of a row of X, given Y = -X/2; `sums` holds np numbers. X is skew: its columns serve.
template <class T>
static T largest_row(long np, const T* Y, T* sums) {
    fill(sums, np, T(0));
    for (long i = 0; i < np; i += 4)
        for (long j = 0; j < np; j += lanes<T>) {
            const T* y = Y + i * np + j;
            const Vec<T> a = load(y), b = load(y + np), c = load(y + 2 * np), d = load(y + 3 * np);
            store(sums + j, load(sums + j) + ((a * a + b * b) + (c * c + d * d)));
        }
    Vec<T> largest{};
    for (long j = 0; j < np; j += lanes<T>) largest = load(sums + j) > largest ? load(sums + j) : largest;
    T result = 0;
    for (long i = 0; i < lanes<T>; ++i) result = largest[i] > result ? largest[i] : result;
    return 4 * result;
}

// S <- S (2 I - (I - X/2) S), one Newton step. Without pivots the error of S grows with ‖X‖; this takes it back to what
// rounding the residual leaves, less than that of LU. Returns where the result is; `work` holds 2 np^2 and a pack.
template <class T>
static const T* newton_step(const Team& team, long n, long np, const T* X, const T* S, T* work) {
    T* A = work;
    T* correction = A + np * np;
    T* pack = correction + np * np;
    load_padded<T>(n, X, A, np, T(-0.5));
    for (long i = 0; i < np; ++i) A[i * np + i] = 1;
    for (long e = 0; e < np * np; e += lanes<T>) store(correction + e, Vec<T>{});
    for (long i = 0; i < np; ++i) correction[i * np + i] = 2;
    multiply<T, Into::subtract>(team, np, np, np, A, np, S, np, correction, np, pack);
    multiply<T>(team, np, np, np, S, np, correction, np, A, np, pack);
    return A;
}

constexpr int large_row = 64;  // squared norm of a row of X beyond which a Newton step follows

// Rows of Q = 2 S; adds the products Q_ij X_ij and their sizes to the sums of column j.
template <class T, int rows>
static inline void store_rows(long n, const T* S, long np, const T* X, T* Q, T* dots, T* sizes) {
    long j = 0;
    for (; j + lanes<T> <= n; j += lanes<T>) {
        Vec<T> dot = load(dots + j), size = load(sizes + j);
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i) {
            const Vec<T> value = T(2) * load(S + i * np + j), term = value * load(X + i * n + j);
            store(Q + i * n + j, value);
            dot += term;
            size += term < 0 ? -term : term;
        }
        store(dots + j, dot);
        store(sizes + j, size);
    }
    for (; j < n; ++j)
        for (int i = 0; i < rows; ++i) {
            const T value = 2 * S[i * np + j], term = value * X[i * n + j];
            Q[i * n + j] = value;
            dots[j] += term;
            sizes[j] += __builtin_fabs(term);
        }
}

// Q = 2 S - I from S = (I - X/2)^-1; false where an entry is not finite. Near 1, a diagonal entry of 2 S - I carries the
// rounding of numbers near 2; S = I + X/2 S gives it as 1 - (sum over j of Q_ji X_ji) / 2 without that. `sums` holds 2 np
// numbers.
template <class T>
static bool store_rotation(long n, const T* S, long np, const T* X, T* Q, T* sums) {
    T* dots = sums;
    T* sizes = sums + np;
    fill(sums, 2 * np, T(0));
    long i = 0;
    for (; i + 4 <= n; i += 4) store_rows<T, 4>(n, S + i * np, np, X + i * n, Q + i * n, dots, sizes);
    for (; i < n; ++i) store_rows<T, 1>(n, S + i * np, np, X + i * n, Q + i * n, dots, sizes);
    T zero = 0;
    for (i = 0; i < n; ++i) {
        T& q = Q[i * n + i];
        q = sizes[i] < 2 ? 1 - dots[i] / 2 : q - 1;
        zero += (q + sizes[i]) * 0;
    }
    return zero == 0;
}

// Q = 2 (I - X/2)^-1 - I
template <class T>
static Status cayley_forward(const Team& caller, const T* X, T* Q, long n, T* work, bool more) {
    const long np = padded<T>(n);
    Ahead next{{X + n * n, Q + n * n}, 2, n * n / unit<T>};
    const Team team{caller.threads, caller.run, more && n < 256 ? &next : nullptr};
    T* A = work;
    load_padded<T>(n, X, A, np, T(-0.5));
    if (parity<T, false>(np, A) != -1) return refused;
    const bool large = largest_row(np, A, work + np * np) > large_row;
    for (long i = 0; i < np; ++i) A[i * np + i] = 1;
    invert(team, np, A, np, work + np * np);
    const T* S = large ? newton_step(team, n, np, X, A, work + np * np) : A;
    return store_rotation(n, S, np, X, Q, work + 2 * np * np) ? ok : overflow;
}

// X_bar = W G W with W = (I + Q)^T / 2 = I + E. In terms of E each product is a correction to what it is added to: sums
// of small terms, where W's diagonal near 1 would put a large one into the middle of each.
template <class T>
static void cayley_backward(const Team& caller, const T* Q, const T* G, T* X_bar, long n, T* work, bool more) {
    const long np = padded<T>(n);
    Ahead next{{Q + n * n, G + n * n, X_bar + n * n}, 3, n * n / unit<T>};
    const Team team{caller.threads, caller.run, more && n < 256 ? &next : nullptr};
    T* E = work;
    T* WG = E + np * np;
    T* extra = WG + np * np;
    T* pack = extra + np * np;
    if (np != n) fill(E, np * np, T(0));
    transpose<T>(n, Q, n, E, np, T(0.5));
    for (long i = 0; i < n; ++i) E[i * np + i] -= T(0.5);
    const T* G_padded = G;
    T* result = X_bar;
    if (np != n) {
        load_padded<T>(n, G, extra, np, T(1));
        G_padded = result = extra;
    }
    multiply<T, Into::add>(team, np, np, np, E, np, G_padded, np, WG, np, pack, false, G_padded);
    multiply<T, Into::add>(team, np, np, np, WG, np, E, np, result, np, pack, false, WG);
    if (np != n) store_unpadded(n, extra, np, X_bar);
}
