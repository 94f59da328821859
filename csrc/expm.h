// Matrix exponential of one matrix and its reverse mode, driven by the table of taylor.py. Included once per instruction
// set, after simd.h. The reverse mode holds every gradient transposed: then all its products are plain ones,
// C = L R giving L_bar^T = R C_bar^T and R_bar^T = C_bar^T L.

template <class T>
struct Terms {
    const T* at[Scheme::max_terms];  // at[0] is the identity and stays null
    int parity[Scheme::max_terms];
};

// The only term of a row, if its coefficient is 1; else 0.
static inline int lone_term(const double* row) {
    int lone = 0;
    for (int i = 0; i < Scheme::max_terms; ++i) {
        if (row[i] == 0) continue;
        if (lone || i == 0 || row[i] != 1) return 0;
        lone = i;
    }
    return lone;
}

// The parity that all terms of a row share (the identity is symmetric), 0 if they do not.
template <class T>
static int common_parity(const double* row, const Terms<T>& terms) {
    int common = 2;
    for (int i = 0; i < Scheme::max_terms; ++i) {
        if (row[i] == 0) continue;
        const int p = i ? terms.parity[i] : 1;
        if (common != 2 && p != common) return 0;
        common = p;
    }
    return common;
}

template <class T, int count>
static void combine_terms(long size, const T* const* terms, const T* c, T* out) {
    for (long i = 0; i < size; i += lanes<T>) {
        Vec<T> sum = c[0] * load(terms[0] + i);
#pragma GCC unroll 8
        for (int t = 1; t < count; ++t) sum += c[t] * load(terms[t] + i);
        store(out + i, sum);
    }
}

// Σ row[i] P[i]: a pointer to the lone term, or `out`, filled.
template <class T>
static const T* combine(const double* row, const Terms<T>& P, long n, long np, T* out) {
    if (const int lone = lone_term(row)) return P.at[lone];
    const T* terms[Scheme::max_terms];
    T c[Scheme::max_terms];
    int count = 0;
    for (int i = 1; i < Scheme::max_terms; ++i)
        if (row[i] != 0) terms[count] = P.at[i], c[count++] = T(row[i]);
    const long size = np * np;
    switch (count) {
        case 1: combine_terms<T, 1>(size, terms, c, out); break;
        case 2: combine_terms<T, 2>(size, terms, c, out); break;
        case 3: combine_terms<T, 3>(size, terms, c, out); break;
        case 4: combine_terms<T, 4>(size, terms, c, out); break;
        case 5: combine_terms<T, 5>(size, terms, c, out); break;
        default: combine_terms<T, 6>(size, terms, c, out); break;
    }
    if (row[0] != 0)
        for (long i = 0; i < n; ++i) out[i * np + i] += T(row[0]);
    return out;
}

// P = L R for commuting L and R; half of it where the result is known to be symmetric or skew.
template <class T>
static void multiply_parity(const Team& team, long np, const T* L, const T* R, T* P, int parity_of_product, T* pack) {
    // At one panel's width the half that is left has as many tiles as the whole.
    const bool half = parity_of_product != 0 && np > TILE_VECTORS * lanes<T>;
    multiply<T>(team, np, np, np, L, np, R, np, P, np, pack, half);
    if (half) mirror(np, P, T(parity_of_product));
}

template <class T>
static void scale_in_place(T* A, long size, T factor) {
    for (long i = 0; i < size; ++i) A[i] *= factor;
}

// Largest column sum of absolute values of the leading rows x n part; `sums` holds n numbers. NaN in, NaN out.
template <class T>
static T column_norm(long rows, long n, const T* A, long ld, T* sums) {
    fill(sums, n, T(0));
    for (long i = 0; i < rows; ++i) {
        const T* row = A + i * ld;
        long j = 0;
        for (; j + lanes<T> <= n; j += lanes<T>) {
            const Vec<T> value = load(row + j);
            store(sums + j, load(sums + j) + (value < 0 ? -value : value));
        }
        for (; j < n; ++j) sums[j] += row[j] < 0 ? -row[j] : row[j];
    }
    T largest = 0;
    for (long j = 0; j < n; ++j)
        if (!(sums[j] <= largest) && largest == largest) largest = sums[j];
    return largest;
}

template <class T>
static T one_norm(const T* X, long n, T* work) {
    return column_norm(n, n, X, n, work);
}

// A bound for the spectral norm of a skew or symmetric A (both are normal) from its power: the smaller of ‖Aᵏ‖₁^(1/k) and
// what the Frobenius norm allows, where each eigenvalue of a skew matrix counts twice.
template <class T>
static T spectral_bound(long np, const T* power, int k, int parity, T* sums) {
    const T column = column_norm(np, np, power, np, sums);
    Vec<T> squares{};
    for (long i = 0; i < np * np; i += lanes<T>) squares += load(power + i) * load(power + i);
    const T sum = sum_lanes<T>(squares), frobenius = __builtin_sqrt(parity == -1 ? sum / 2 : sum);
    const T least_norm = frobenius < column ? frobenius : column;
    return k == 2 ? __builtin_sqrt(least_norm) : __builtin_cbrt(least_norm);
}

template <class T> static T theta(const Scheme& s) { return T(sizeof(T) == 4 ? s.theta32 : s.theta64); }

template <class T>
static Plan plan_for(const Schemes& schemes, T norm) {
    for (int i = 0; i < schemes.count; ++i)
        if (norm <= theta<T>(schemes.at[i])) return {i, 0};
    int squarings = 0;
    for (T scaled = norm; scaled > theta<T>(schemes.at[schemes.count - 1]); scaled /= 2) ++squarings;
    return {schemes.count - 1, squarings};
}

static inline bool starts_with_cube(const Scheme& s) {
    return s.products > 1 && lone_term(s.left[1]) == 1 && lone_term(s.right[1]) == 2;
}

// Matrices on the tape: P2 ... but the last product (nothing depends on its value), then what was squared.
template <class T>
static long expm_tape(long n, int squarings) {
    return (Scheme::max_products - 1 + squarings) * padded<T>(n) * padded<T>(n);
}

template <class T>
static long expm_work(long n, int threads) {
    const long np = padded<T>(n);
    return 12 * np * np + threads * pack_size<T>(np, np) + np;
}

template <class T>
static Status expm_forward(const Team& team, const Schemes& schemes, const T* X, T* E, long n, T* tape, Plan* plan_out, T* work) {
    const long np = padded<T>(n), size = np * np;
    T* A = work;
    T* left = A + size;
    T* right = left + size;
    T* last = right + size;
    T* spare[2] = {last + size, last + 2 * size};
    T* products = tape ? tape : spare[1] + size;
    T* sums = work + 12 * size;
    T* pack = sums + np;

    load_padded<T>(n, X, A, np, T(1));
    T norm = column_norm(np, np, A, np, sums);
    const T finite = sizeof(T) == 4 ? T(__FLT_MAX__) : T(__DBL_MAX__);
    if (!(norm <= finite)) return refused;
    if (norm > (sizeof(T) == 4 ? T(1 / __FLT_EPSILON__) : T(1 / __DBL_EPSILON__))) return too_large;

    Terms<T> P{};
    P.at[1] = A;
    P.parity[1] = parity(np, A);
    P.at[2] = products;
    P.parity[2] = P.parity[1] != 0;
    multiply_parity<T>(team, np, A, A, products, P.parity[2], pack);
    int known = 1;
    if (P.parity[1]) {
        const T square = spectral_bound(np, products, 2, P.parity[1], sums);
        if (square < norm) norm = square;
        if (starts_with_cube(schemes.at[plan_for(schemes, norm).scheme])) {
            multiply_parity<T>(team, np, A, products, products + size, P.parity[1], pack);
            const T cube = spectral_bound(np, products + size, 3, P.parity[1], sums);
            if (cube < norm) norm = cube;
            known = 2;
        }
    }
    const Plan plan = plan_for(schemes, norm);
    const Scheme& scheme = schemes.at[plan.scheme];
    if (!starts_with_cube(scheme)) known = 1;
    T factor = 1;
    for (int i = 0; i < plan.squarings; ++i) factor /= 2;
    if (plan.squarings) {
        scale_in_place(A, size, factor);
        scale_in_place(products, size, factor * factor);
        if (known == 2) scale_in_place(products + size, size, factor * factor * factor);
    }

    for (int k = 1; k < scheme.products; ++k) {
        T* out = k == scheme.products - 1 ? last : products + k * size;
        const int sign = common_parity(scheme.left[k], P) * common_parity(scheme.right[k], P);
        P.at[k + 2] = out;
        P.parity[k + 2] = sign;
        if (k < known && out != last) continue;
        const T* L = combine(scheme.left[k], P, n, np, left);
        const T* R = combine(scheme.right[k], P, n, np, right);
        multiply_parity<T>(team, np, L, R, out, sign, pack);
    }
    if (scheme.products == 1) P.at[2] = products;
    T* power = tape ? products + (scheme.products - 1) * size : spare[0];
    combine(scheme.result, P, n, np, plan.squarings ? power : left);
    const T* result = left;
    const int sign = common_parity(scheme.result, P);
    for (int i = 0; i < plan.squarings; ++i) {
        const bool final = i + 1 == plan.squarings;
        T* next = final ? left : tape ? power + size : spare[(i + 1) % 2];
        multiply_parity<T>(team, np, power, power, next, sign, pack);
        power = next;
    }
    *plan_out = plan;
    return store_unpadded(n, result, np, E) ? ok : overflow;
}

// bars[i] += row[i] bar, the transpose of `combine`; `fresh` marks the bars that hold nothing yet.
template <class T>
static void scatter(const double* row, const T* bar, T* const* bars, bool* fresh, long size) {
    for (int i = 1; i < Scheme::max_terms; ++i) {
        if (row[i] == 0) continue;
        const T c = T(row[i]);
        T* out = bars[i];
        if (fresh[i])
            for (long e = 0; e < size; e += lanes<T>) store(out + e, c * load(bar + e));
        else
            for (long e = 0; e < size; e += lanes<T>) store(out + e, load(out + e) + c * load(bar + e));
        fresh[i] = false;
    }
}

// Adds row[i] (L R) to bars[i]; straight into the bar where there is only one.
template <class T>
static void scatter_product(const Team& team, const double* row, const T* L, const T* R, T* const* bars, bool* fresh, long np, T* product,
                            T* pack) {
    const int lone = lone_term(row);
    if (lone && !fresh[lone]) return multiply<T, Into::add>(team, np, np, np, L, np, R, np, bars[lone], np, pack);
    multiply<T>(team, np, np, np, L, np, R, np, lone ? bars[lone] : product, np, pack);
    if (lone)
        fresh[lone] = false;
    else
        scatter(row, product, bars, fresh, np * np);
}

template <class T>
static void expm_backward(const Team& team, const Schemes& schemes, const T* X, const T* tape, const T* G, T* X_bar, long n, Plan plan,
                          T* work) {
    const long np = padded<T>(n), size = np * np;
    const Scheme& scheme = schemes.at[plan.scheme];
    T* A = work;
    T* left = A + size;
    T* right = left + size;
    T* product = right + size;
    T* bar = product + size;
    T* other = bar + size;
    T* bars[Scheme::max_terms] = {};
    bool fresh[Scheme::max_terms];
    for (int i = 1; i < Scheme::max_terms; ++i) bars[i] = other + i * size, fresh[i] = true;
    T* pack = work + 12 * size;

    T factor = 1;
    for (int i = 0; i < plan.squarings; ++i) factor /= 2;
    load_padded<T>(n, X, A, np, factor);
    if (np != n) fill(bar, size, T(0));
    transpose<T>(n, G, n, bar, np, T(1));
    for (int i = plan.squarings; i-- > 0;) {
        const T* P = tape + (scheme.products - 1 + i) * size;
        multiply<T>(team, np, np, np, P, np, bar, np, other, np, pack);
        multiply<T, Into::add>(team, np, np, np, bar, np, P, np, other, np, pack);
        T* swap = bar;
        bar = other;
        other = swap;
    }

    Terms<T> P{};
    P.at[1] = A;
    for (int k = 0; k + 1 < scheme.products; ++k) P.at[k + 2] = tape + k * size;
    double result[Scheme::max_terms];
    for (int i = 0; i < Scheme::max_terms; ++i) result[i] = i == scheme.products + 1 ? 0 : scheme.result[i];
    scatter(result, bar, bars, fresh, size);
    // The last product enters the result with its own coefficient: its bar is a multiple of G.
    const double last = scheme.result[scheme.products + 1];
    if (last != 1) scale_in_place(bar, size, T(last));
    for (int k = scheme.products; k-- > 0;) {
        const T* C = k == scheme.products - 1 ? bar : bars[k + 2];
        const T* L = combine(scheme.left[k], P, n, np, left);
        bool square = true;
        for (int i = 0; i < Scheme::max_terms; ++i) square &= scheme.left[k][i] == scheme.right[k][i];
        if (square) {
            const int lone = lone_term(scheme.left[k]);
            T* out = lone ? bars[lone] : product;
            if (lone && !fresh[lone])
                multiply<T, Into::add>(team, np, np, np, L, np, C, np, out, np, pack);
            else
                multiply<T>(team, np, np, np, L, np, C, np, out, np, pack);
            multiply<T, Into::add>(team, np, np, np, C, np, L, np, out, np, pack);
            if (lone)
                fresh[lone] = false;
            else
                scatter(scheme.left[k], product, bars, fresh, size);
        } else {
            const T* R = combine(scheme.right[k], P, n, np, right);
            scatter_product(team, scheme.left[k], R, C, bars, fresh, np, product, pack);
            scatter_product(team, scheme.right[k], C, L, bars, fresh, np, product, pack);
        }
    }
    transpose<T>(n, bars[1], np, X_bar, n, factor);
}
