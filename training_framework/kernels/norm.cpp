// Fused batch norm for training on CPU, fp32:  y = act((x - mean) * invstd * weight + bias + shortcut)
// and its backward, act = ReLU, GELU, SiLU or nothing. Statistics per channel over all rows.
//
// Layout: x, y, shortcut and their gradients are [rows][C] (an NHWC activation, rows = N*H*W),
// everything per channel is [C]. C is a multiple of 16.
//
// Memory bandwidth limits the speed, so the design minimizes passes. Forward: reads x twice, writes y
// once. Backward: reads gy and x twice, writes gx once; for the mask see the comments there.
// Each thread has a contiguous range of rows in both passes and walks it backwards in the second:
// the end of the range (or all of it, if it fits) is then still in L2.
//
// No state, no allocation. Ranges and the order of all sums depend only on the number of threads.
// No -ffast-math: NaN and Inf pass through.
#include <cstddef>
#include <cmath>
#include <algorithm>
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
enum { VL = 16, NV = 4 };   // NV: vectors of channels per tile, with coefficients and sums in registers
#elif defined(__AVX__)
enum { VL = 8, NV = 2 };
#else
enum { VL = 4, NV = 2 };
#endif
// Rows per tile: TILE / C within bounds. Float sums end with the tile; its size hardly affects the speed.
enum { TILE = 32768, MIN_ROWS = 16, MAX_ROWS = 256, SAMPLES = 8 };

typedef float vec __attribute__((vector_size(VL * 4)));
typedef float vec_u __attribute__((vector_size(VL * 4), aligned(4)));   // unaligned access
typedef int ivec __attribute__((vector_size(VL * 4)));
typedef long idx;

static inline vec load(const float* p) { return *(const vec_u*)p; }
static inline void store(float* p, vec v) { *(vec_u*)p = v; }
// A pre-activation. Forward and backward both call this, so that backward recomputes from x exactly
// the mask that forward applied. Centring first (instead of x*scale + b)
// keeps full accuracy for |mean| >> std.
static inline vec affine(vec x, vec mean, vec scale, vec shift) { return (x - mean) * scale + shift; }
// Like torch: relu(NaN) is NaN, and the gradient is zero where y <= 0, hence not for NaN.
static inline vec relu(vec v) { vec z = {}; return z > v ? z : v; }
static inline vec masked(vec g, vec y) { vec z = {}; return y <= z ? z : g; }

// e^x: 2^n by the exponent's bits times a polynomial on [-ln 2 / 2, ln 2 / 2], two units in the last
// place. 0 below e^-87 and infinite above e^88: times a huge z, a small number there would be wrong.
// Adding 1.5 * 2^23 rounds to an integer.
static inline vec exponential(vec whole) {
    const vec low = vec{} - 87.f, high = vec{} + 88.f, infinite = vec{} + INFINITY;
    vec x = whole < low ? low : whole;
    x = x > high ? high : x;
    const float magic = 12582912.f;
    const vec t = x * 1.44269504f + magic, n = t - magic;
    const vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    vec p = r * 1.38888889e-3f + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    const ivec power = ((ivec)t - 0x4B400000 + 127) << 23;
    const vec found = p * (vec)power;
    return whole < low ? vec{} : whole > high ? infinite : found;
}
// The share of the standard normal distribution below z, and its density at z. Abramowitz and Stegun,
// Handbook of Mathematical Functions, 7.1.26: an error of at most 1e-7, about fp32's.
static inline vec normal_share(vec z, vec& density) {
    const vec zero = {}, e = exponential(z * z * -0.5f), x = (z < zero ? -z : z) * 0.707106781f;
    const vec t = 1.f / (x * 0.3275911f + 1.f);
    vec p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vec tail = p * t * e * 0.5f;
    density = e * 0.398942280f;
    return z < zero ? tail : 1.f - tail;
}
static inline vec gelu(vec z) { vec density; return z * normal_share(z, density); }
static inline vec gelu_slope(vec z) {
    vec density;
    const vec share = normal_share(z, density);
    return share + z * density;
}
static inline vec logistic(vec z) { return 1.f / (exponential(-z) + 1.f); }
static inline vec silu_slope(vec z) { const vec s = logistic(z); return s * (z * (1.f - s) + 1.f); }

enum Activation { NONE, RELU, GELU, SILU };
template <int A> static inline vec activated(vec z) {
    return A == RELU ? relu(z) : A == GELU ? gelu(z) : A == SILU ? z * logistic(z) : z;
}

// Arguments of a pass; unused ones are NULL. mean is subtracted from x.
struct Args {
    const float *x, *other, *y;         // [rows][C]; other: shortcut (forward) or gy (backward)
                                        // y: ReLU's output, or the shortcut of GELU and SiLU
    float *out;                         // [rows][C]
    const float *mean, *scale, *shift;  // [C]
    const float *k0, *k1;               // [C], backward's second pass
    idx C;
};
// What a pass uses: only moments of x; gy; gy masked by y; gy masked by the recomputed y; gy times the
// slope at the recomputed sum, without and with a shortcut.
enum Mode { MOMENTS, PLAIN, MASK_Y, MASK_X, GELU_X, GELU_Y, SILU_X, SILU_Y };
static constexpr bool recomputes(int m) { return m >= MASK_X; }
static constexpr bool reads_y(int m) { return m == MASK_Y || m == GELU_Y || m == SILU_Y; }

// V vectors of a per-channel array from channel c on.
template <int V> struct Vecs {
    vec v[V];
    Vecs(const float* p, idx c) { for (int i = 0; i < V; ++i) v[i] = load(p + c + i * VL); }
    vec operator[](int i) const { return v[i]; }
};
static inline idx tile_rows(idx C) { return std::min<idx>(MAX_ROWS, std::max<idx>(MIN_ROWS, TILE / C)); }
// First channel of thread `me` of n between the passes, in units of B (one cache line). This work
// is written as loops over small arrays of B, which the compiler vectorizes: as scalars, the divisions
// and roots of 512 channels took as long as both passes over 64 rows.
enum { B = 16 };
static inline idx part(idx C, int me, int n) { return C / B * me / n * B; }

// Calls f(number of vectors V, first channel) for all C channels: NV vectors at a time, then fewer.
template <class F> static inline void columns(idx C, F f) {
    idx c = 0;
    for (; c + NV * VL <= C; c += NV * VL) f(std::integral_constant<int, NV>(), c);
    if (NV == 4 && c + 2 * VL <= C) { f(std::integral_constant<int, 2>(), c); c += 2 * VL; }
    for (; c < C; c += VL) f(std::integral_constant<int, 1>(), c);
}

// gy of one vector at offset i with the mask of mode M applied.
template <int M> static inline vec gradient(const Args& a, idx i, vec x, vec mean, vec scale, vec shift) {
    vec g = load(a.other + i);
    if (M == MASK_Y) return masked(g, load(a.y + i));
    if (M == MASK_X) return masked(g, affine(x, mean, scale, shift));
    if (M >= GELU_X) {
        vec z = affine(x, mean, scale, shift);
        if (reads_y(M)) z += load(a.y + i);
        return g * (M == GELU_X || M == GELU_Y ? gelu_slope(z) : silu_slope(z));
    }
    return g;
}

// Two sums over rows r0..r1 for V vectors of channels from c on, added to sum[2][C]:
// MOMENTS: x - mean and its square; else g and g * (x - mean). A tile is summed in float over
// at most MAX_ROWS rows, and tiles in double: a float chain over 65,536 rows would cost two digits.
template <int M, int V> static void reduce_tile(const Args& a, idx r0, idx r1, idx c, double* sum) {
    enum { U = NV / V };   // rows at a time; NV independent chains hide the latency
    const Vecs<V> mean(a.mean, c), scale(recomputes(M) ? a.scale : a.mean, c), shift(recomputes(M) ? a.shift : a.mean, c);
    vec s[U][V] = {}, q[U][V] = {};
    auto step = [&](idx r, int u) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const idx i = r * a.C + c + v * VL;
            const vec x = load(a.x + i), d = x - mean[v];
            const vec g = M == MOMENTS ? d : gradient<M>(a, i, x, mean[v], scale[v], shift[v]);
            if (reads_y(M) && a.out) store(a.out + i, g);
            s[u][v] += g; q[u][v] += g * d;
        }
    };
    idx r = r0;
    for (; r + U <= r1; r += U)
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u) step(r + u, u);
    for (; r < r1; ++r) step(r, 0);
    float buf[2][U][V * VL];
    for (int u = 0; u < U; ++u)
        for (int v = 0; v < V; ++v) { store(buf[0][u] + v * VL, s[u][v]); store(buf[1][u] + v * VL, q[u][v]); }
    for (int k = 0; k < 2; ++k)
        for (int u = 0; u < U; ++u)
            for (int i = 0; i < V * VL; ++i) sum[k * a.C + c + i] += buf[k][u][i];
}

// The same over any rows and all channels; sum[2][C] is overwritten.
template <int M> static void reduce(const Args& a, idx r0, idx r1, double* sum) {
    std::fill(sum, sum + 2 * a.C, 0.);
    const idx T = tile_rows(a.C);
    for (idx r = r0; r < r1; r += T)
        columns(a.C, [&](auto v, idx c) { reduce_tile<M, decltype(v)::value>(a, r, std::min(r + T, r1), c, sum); });
}

// Forward's second pass over a tile: a.out = act((x - mean) * scale + shift + shortcut?).
template <int ACT, bool ADD, int V> static void apply_tile(const Args& a, idx r0, idx r1, idx c) {
    const Vecs<V> mean(a.mean, c), scale(a.scale, c), shift(a.shift, c);
    for (idx r = r0; r < r1; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const idx i = r * a.C + c + v * VL;
            vec y = affine(load(a.x + i), mean[v], scale[v], shift[v]);
            if (ADD) y += load(a.other + i);
            store(a.out + i, activated<ACT>(y));
        }
}

// Backward's second pass over a tile: a.out = scale * g + k1 * (x - mean) + k0.
template <int M, int V> static void gradient_tile(const Args& a, idx r0, idx r1, idx c) {
    const Vecs<V> mean(a.mean, c), scale(a.scale, c), shift(a.shift, c), k0(a.k0, c), k1(a.k1, c);
    for (idx r = r0; r < r1; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const idx i = r * a.C + c + v * VL;
            const vec x = load(a.x + i), g = gradient<M>(a, i, x, mean[v], scale[v], shift[v]);
            store(a.out + i, scale[v] * g + (k1[v] * (x - mean[v]) + k0[v]));
        }
}

// Runs a second pass f(V, r, end, c) over the tiles of rows r0..r1, last tile first (see the top).
template <class F> static inline void sweep(idx C, idx r0, idx r1, F f) {
    const idx T = tile_rows(C);
    if (r0 < r1)
        for (idx r = r0 + (r1 - r0 - 1) / T * T; r >= r0; r -= T)
            columns(C, [&](auto v, idx c) { f(v, r, std::min(r + T, r1), c); });
}
template <int ACT, bool ADD> static void apply(const Args& a, idx r0, idx r1) {
    sweep(a.C, r0, r1, [&](auto v, idx r, idx end, idx c) { apply_tile<ACT, ADD, decltype(v)::value>(a, r, end, c); });
}
template <int ACT> static void apply(const Args& a, idx r0, idx r1) {
    a.other ? apply<ACT, true>(a, r0, r1) : apply<ACT, false>(a, r0, r1);
}
static void apply(int act, const Args& a, idx r0, idx r1) {
    switch (act) {
        case RELU: return apply<RELU>(a, r0, r1);
        case GELU: return apply<GELU>(a, r0, r1);
        case SILU: return apply<SILU>(a, r0, r1);
        default: return apply<NONE>(a, r0, r1);
    }
}
template <int M> static void gradients(const Args& a, idx r0, idx r1) {
    sweep(a.C, r0, r1, [&](auto v, idx r, idx end, idx c) { gradient_tile<M, decltype(v)::value>(a, r, end, c); });
}

// Calls f(mode) for the mode of an activation, with or without y.
template <class F> static void with_mode(int act, bool y, F f) {
    auto call = [&](auto with, auto without) { y ? f(with) : f(without); };
    switch (act) {
        case RELU: return call(std::integral_constant<int, MASK_Y>(), std::integral_constant<int, MASK_X>());
        case GELU: return call(std::integral_constant<int, GELU_Y>(), std::integral_constant<int, GELU_X>());
        case SILU: return call(std::integral_constant<int, SILU_Y>(), std::integral_constant<int, SILU_X>());
        default: return f(std::integral_constant<int, PLAIN>());
    }
}

// One thread's moments of its rows r0..r1: sum[2][C] of x - ref and its square, and ref[C] itself.
// ref is near the mean (the mean of a few rows), which makes the one-pass variance safe:
// it loses a factor of 1 + (mean - ref)^2 / var. If that exceeds 64 for any channel, a second
// round starts from the computed mean. A ref that is not finite would turn an infinite mean into NaN.
static void moments(Args a, idx r0, idx r1, float* ref, double* sum) {
    const idx C = a.C, n = r1 - r0, m = std::min<idx>(SAMPLES, n);
    if (!n) return;
    std::fill(sum, sum + C, 0.);
    for (idx j = 0; j < m; ++j) {
        const float* row = a.x + (r0 + n * j / m) * C;
        for (idx c = 0; c < C; ++c) sum[c] += row[c];
    }
    for (idx c = 0; c < C; ++c) ref[c] = std::fabs(sum[c]) < 1e30 ? float(sum[c] * (1. / m)) : 0;
    a.mean = ref;
    for (int round = 0; round < 2; ++round) {
        reduce<MOMENTS>(a, r0, r1, sum);
        int bad = 0;   // (mean - ref)^2 > 64 var, multiplied out: the loop has no division
        for (idx c = 0; c < C; ++c) bad |= 65 * sum[c] * sum[c] > 64. * n * sum[C + c];
        if (!bad || round) break;
        for (idx c = 0; c < C; ++c) ref[c] += float(sum[c] * (1. / n));
    }
}

// Scratch: sum (2C doubles) and ref (C floats) per thread; scale, k0 and k1 (3C floats) for all.
extern "C" idx norm_scratch(idx C, int threads) { return threads * 5 * C + 3 * C; }
// Runs body(thread, threads, barrier).
template <class F> static void parallel(int threads, F body) {
#ifdef _OPENMP
    if (threads > 1) {   // a team of one would only add overhead
#pragma omp parallel num_threads(threads)
        body(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
        });
        return;
    }
#endif
    body(0, 1, [] {});
}

// y[rows][C] from x[rows][C], shortcut[rows][C] or NULL, weight[C], bias[C].
// save[5][C], output: mean, 1 / sqrt(var + eps), shift of `affine`, rounding error of the mean in
// float, and unbiased variance for the running statistics. The rounding error corrects the shift
// (otherwise the bias) and the gradients.
extern "C" void norm_forward(const float* x, const float* shortcut, const float* weight,
        const float* bias, float eps, int act,
        float* y, float* save, float* scratch, idx rows, idx C, int threads) {
    double* sums = (double*)scratch;
    float *refs = scratch + threads * 4 * C, *scale = refs + threads * C;
    Args a = {x, shortcut, nullptr, y, save, scale, save + 2 * C, nullptr, nullptr, C};
    parallel(threads, [&](int me, int n, auto barrier) {
        const idx r0 = rows * me / n, r1 = rows * (me + 1) / n;
        moments(a, r0, r1, refs + me * C, sums + me * 2 * C);
        barrier();
        for (idx c = part(C, me, n), end = part(C, me + 1, n); c < end; c += B) {
            double mean[B] = {}, square[B] = {}, inv[B], w[B], b[B];
            for (int round = 0; round < 2; ++round) {   // Chan: means, then squares about the common mean
                for (int t = 0; t < n; ++t) {
                    const double *s = sums + t * 2 * C + c, *q = s + C, nt = rows * (t + 1) / n - rows * t / n;
                    const float* ref = refs + t * C + c;
                    if (!nt) continue;
                    if (round) for (int i = 0; i < B; ++i) {
                        const double d = ref[i] - mean[i];
                        square[i] += q[i] + d * (2 * s[i] + nt * d);
                    } else for (int i = 0; i < B; ++i) mean[i] += ref[i] * nt + s[i];
                }
                if (!round) for (int i = 0; i < B; ++i) mean[i] *= 1. / rows;
            }
            for (int i = 0; i < B; ++i) {
                square[i] = square[i] < 0 ? 0 : square[i];
                inv[i] = 1 / std::sqrt(square[i] * (1. / rows) + eps);
                w[i] = weight[c + i];
                b[i] = bias[c + i];
            }
            for (int i = 0; i < B; ++i) {
                const float m = mean[i], invstd = inv[i], k = float(w[i]) * invstd;
                const double d = m - mean[i], low = std::fabs(d) < 1e30 ? d : 0;   // 0 for an infinite mean
                save[c + i] = m; save[C + c + i] = invstd; save[2 * C + c + i] = b[i] + low * k;
                save[3 * C + c + i] = low; scale[c + i] = k;
                save[4 * C + c + i] = square[i] * (1. / (rows - 1));
            }
        }
        barrier();
        apply(act, a, r0, r1);
    });
}

// Gradients for gy[rows][C]: gx[rows][C] (or NULL), gweight[C], gbias[C] from x[rows][C],
// weight[C], and save[5][C] of the forward pass. With an activation, gy is multiplied by its slope first:
//   y != NULL, ReLU         zero where y <= 0; gshortcut[rows][C] (or NULL) receives the product. The
//                           first pass writes it, so that the second reads it instead of gy and y.
//   y != NULL, GELU, SiLU   the same with the slope at the sum, recomputed from x and the shortcut y.
//   y == NULL               the slope is recomputed from x, ReLU's bit for bit (only without a
//                           shortcut), which saves reading y in each pass.
extern "C" void norm_backward(const float* gy, const float* x, const float* y, const float* weight,
        const float* save, int act, float* gx, float* gshortcut, float* gweight, float* gbias,
        float* scratch, idx rows, idx C, int threads) {
    double* sums = (double*)scratch;
    float *scale = scratch + threads * 5 * C, *k0 = scale + C, *k1 = k0 + C;
    for (idx c = 0; c < C; ++c) scale[c] = weight[c] * save[C + c];
    const Args a = {x, gy, y, gshortcut, save, scale, save + 2 * C, k0, k1, C};
    parallel(threads, [&](int me, int n, auto barrier) {
        const idx r0 = rows * me / n, r1 = rows * (me + 1) / n;
        double* sum = sums + me * 2 * C;
        with_mode(act, y, [&](auto mode) { reduce<decltype(mode)::value>(a, r0, r1, sum); });
        barrier();
        for (idx c = part(C, me, n), end = part(C, me + 1, n); c < end; c += B) {
            double g[B] = {}, gd[B] = {};
            for (int t = 0; t < n; ++t) {
                const double* s = sums + t * 2 * C + c;
                for (int i = 0; i < B; ++i) { g[i] += s[i]; gd[i] += s[C + i]; }
            }
            for (int i = 0; i < B; ++i) {
                const double invstd = save[C + c + i], k = scale[c + i], low = save[3 * C + c + i];
                gd[i] += low * g[i];
                gbias[c + i] = g[i];
                gweight[c + i] = gd[i] * invstd;
                const double slope = -k * invstd * invstd * gd[i] * (1. / rows);
                k1[c + i] = slope;
                k0[c + i] = slope * low - k * g[i] * (1. / rows);
            }
        }
        barrier();
        if (!gx) return;
        Args b = a;
        b.out = gx;
        if (act != NONE && gshortcut) b.other = gshortcut;
        with_mode(gshortcut ? NONE : act, y, [&](auto mode) { gradients<decltype(mode)::value>(b, r0, r1); });
    });
}
