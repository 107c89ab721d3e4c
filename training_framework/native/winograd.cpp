// Fused Winograd F(2x2,3x3) convolution for training on CPU, fp32: 3x3, stride 1, padding 1.
//
//   forward         y  = A^T [ (G w G^T) .* (B^T x B) ] A           (Lavin & Gray, arXiv 1509.09308)
//   input gradient  the same kernel applied to dy with w rotated by 180 degrees, channels swapped
//   weight gradient dw = G^T [ sum over tiles (B^T x B) .* (A dy A^T) ] G, the exact adjoint
//
// 2.25 times fewer multiplications than a direct convolution; the price is the traffic of the
// transformed tiles. Everything here is arranged so that this traffic stays in L2: a block of
// tiles is transformed, multiplied and transformed back before the next block is touched.
//
// Layouts (float32):  x [N][H][W][C]   y, dy [N][H][W][K]   w, dw [K][3][3][C]   (channels_last)
//   V   [f][panel of C][tile][PW]     transformed input of one block of tiles, f = 4*row + col
//   U   [f][panel of K][C][PW]        transformed weights
//   M   [f][panel of K][tile][PW]     products
// A panel is PW = 2 vectors of channels. Panels (instead of rows of C floats) keep every stream of
// the matrix kernels contiguous: with rows of 512 floats all rows fall into two L1 sets.
// C and K are multiples of 16; the last panel may be half full (its stride is PW all the same).
//
// No state, no allocation: the caller passes scratch (see winograd_scratch). Work is divided in a
// fixed way and partial sums are added in a fixed order, so a result depends on the number of
// threads only. No -ffast-math: NaN and Inf go through.
#include <cstddef>
#include <cstring>
#include <algorithm>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
static int thread_number() { return omp_get_thread_num(); }
static int thread_count() { return omp_get_num_threads(); }
#else
static int thread_number() { return 0; }
static int thread_count() { return 1; }
#endif

#if defined(__AVX512F__)
enum { VL = 16, ROWS = 14, WROWS = 8 };   // ROWS*2 accumulators + 2 + 1 of 32 registers
#elif defined(__AVX__)
enum { VL = 8, ROWS = 6, WROWS = 4 };     // 16 registers
#else
enum { VL = 4, ROWS = 6, WROWS = 4 };
#endif
enum { PW = 2 * VL };

typedef float vec __attribute__((vector_size(VL * 4)));
typedef float vec_u __attribute__((vector_size(VL * 4), aligned(4)));   // unaligned access
typedef long idx;
#define UNROLL _Pragma("GCC unroll 16")

static inline vec load(const float* p) { return *(const vec_u*)p; }
static inline void store(float* p, vec v) { *(vec_u*)p = v; }
static inline idx up(idx a, idx b) { return (a + b - 1) / b; }

// Shape of one convolution. th, tw: 2x2 output tiles per image; a tile hanging over the border
// (odd H or W) reads zeros and its surplus outputs go to a dummy.
struct Conv {
    idx N, H, W, C, K, th, tw, T, cp, kp;
    Conv(idx n, idx h, idx w, idx c, idx k)
        : N(n), H(h), W(w), C(c), K(k), th(up(h, 2)), tw(up(w, 2)), T(n * th * tw),
          cp(up(c, PW)), kp(up(k, PW)) {}
};

// Walks over tiles in order without a division for each.
struct Tile {
    const Conv& s; idx n, i, j;
    Tile(const Conv& s_, idx t) : s(s_), n(t / (s_.th * s_.tw)), i(t / s_.tw % s_.th), j(t % s_.tw) {}
    void next() { if (++j == s.tw) { j = 0; if (++i == s.th) { i = 0; ++n; } } }
    // Pointers to SIZE x SIZE pixels from (2i-off, 2j-off) of img [N][H][W][chan]; outside: `none`.
    template <int SIZE> void pixels(const float* img, idx chan, int off, const float* none,
                                    const float** p) const {
        idx h0 = 2 * i - off, w0 = 2 * j - off;
        const float* base = img + ((n * s.H + h0) * s.W + w0) * chan;
        for (int a = 0; a < SIZE; ++a)
            for (int b = 0; b < SIZE; ++b)
                p[a * SIZE + b] = (size_t)(h0 + a) < (size_t)s.H && (size_t)(w0 + b) < (size_t)s.W
                                      ? base + (a * s.W + b) * chan : none;
    }
};

// Line i of B^T = [1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1] applied to four values.
static inline vec bt(int i, vec d0, vec d1, vec d2, vec d3) {
    return i == 0 ? d0 - d2 : i == 1 ? d1 + d2 : i == 2 ? d2 - d1 : d1 - d3;
}
// Line i of A = [1 0; 1 1; 1 -1; 0 -1] applied to two values.
static inline vec at(int i, vec g0, vec g1) {
    return i == 0 ? g0 : i == 1 ? g0 + g1 : i == 2 ? g0 - g1 : -g1;
}

// V = B^T x B of `len` tiles from t0 on, rows I0 .. I0+NR-1 of the 4x4 frequencies:
// x [N][H][W][chan] -> V [NR*4][panels][stride tiles][PW], frequencies fs floats apart.
// zero: chan zeros, what lies outside the image.
template <int I0, int NR> static void input_transform(const Conv& s, const float* x, idx chan,
        idx t0, idx len, const float* zero, float* V, idx stride, idx fs) {
    Tile tile(s, t0);
    for (idx t = 0; t < len; ++t, tile.next()) {
        const float* p[16];
        tile.pixels<4>(x, chan, 1, zero, p);
        for (idx c = 0; c < chan; c += VL) {
            float* v = V + (c / PW * stride + t) * PW + c % PW;
            vec e[NR][4];
            UNROLL for (int b = 0; b < 4; ++b) {
                vec d0 = load(p[b] + c), d1 = load(p[4 + b] + c);
                vec d2 = load(p[8 + b] + c), d3 = load(p[12 + b] + c);
                UNROLL for (int a = 0; a < NR; ++a) e[a][b] = bt(I0 + a, d0, d1, d2, d3);
            }
            UNROLL for (int a = 0; a < NR; ++a)
                UNROLL for (int b = 0; b < 4; ++b)
                    store(v + (4 * a + b) * fs, bt(b, e[a][0], e[a][1], e[a][2], e[a][3]));
        }
    }
}

// dM = A dy A^T, the same for the output gradient dy [N][H][W][chan] (2x2 pixels per tile).
template <int I0, int NR> static void grad_transform(const Conv& s, const float* dy, idx chan,
        idx t0, idx len, const float* zero, float* G, idx stride, idx fs) {
    Tile tile(s, t0);
    for (idx t = 0; t < len; ++t, tile.next()) {
        const float* p[4];
        tile.pixels<2>(dy, chan, 0, zero, p);
        for (idx c = 0; c < chan; c += VL) {
            float* g = G + (c / PW * stride + t) * PW + c % PW;
            vec d0 = load(p[0] + c), d1 = load(p[1] + c), d2 = load(p[2] + c), d3 = load(p[3] + c);
            UNROLL for (int a = 0; a < NR; ++a)
                UNROLL for (int b = 0; b < 4; ++b)
                    store(g + (4 * a + b) * fs, at(b, at(I0 + a, d0, d2), at(I0 + a, d1, d3)));
        }
    }
}

// y = A^T M A for `len` tiles and the channels k0 .. k1: M [16][panels][stride tiles][PW].
static void output_transform(const Conv& s, const float* M, idx fs, idx stride, idx t0, idx len,
                             idx k0, idx k1, float* dummy, float* y) {
    Tile tile(s, t0);
    for (idx t = 0; t < len; ++t, tile.next()) {
        const float* p[4];
        tile.pixels<2>(y, s.K, 0, dummy, p);
        for (idx k = k0; k < k1; k += VL) {
            const float* m = M + ((k - k0) / PW * stride + t) * PW + (k - k0) % PW;
            vec e[2][4];
            UNROLL for (int b = 0; b < 4; ++b) {
                vec m0 = load(m + b * fs), m1 = load(m + (4 + b) * fs);
                vec m2 = load(m + (8 + b) * fs), m3 = load(m + (12 + b) * fs);
                e[0][b] = m0 + m1 + m2; e[1][b] = m1 - m2 - m3;
            }
            for (int a = 0; a < 2; ++a) {
                store((float*)p[2 * a] + k, e[a][0] + e[a][1] + e[a][2]);
                store((float*)p[2 * a + 1] + k, e[a][1] - e[a][2] - e[a][3]);
            }
        }
    }
}

// M[R][PW] = sum over c of A[c][row] * B[c][NV vectors]: A in panels [panel][stride tiles][PW]
// (the broadcast operand), B packed [C][PW]. All R*NV sums live in registers. Meanwhile the next
// C*8 floats from `next` on go to L2, two lines per 4 steps: weights of 256 and more channels come
// from L3, and the processor's own prefetch stops at each page (worth 10 % there, free elsewhere).
template <int R, int NV> static void gemm(const float* A, idx astep, const float* B, idx C, float* M,
                                          const float* next) {
    vec acc[R][NV] = {};
    for (idx c = 0; c < C; c += PW, A += astep) {
        idx n = std::min<idx>(PW, C - c);
        for (idx k = 0; k < n; k += 4, B += 4 * PW, next += 32) {
            __builtin_prefetch(next, 0, 2);
            __builtin_prefetch(next + 16, 0, 2);
            UNROLL for (int j = 0; j < 4; ++j) {
                vec b[NV];
                UNROLL for (int v = 0; v < NV; ++v) b[v] = load(B + j * PW + v * VL);
                UNROLL for (int r = 0; r < R; ++r) {
                    vec a = A[r * PW + k + j] - vec{};
                    UNROLL for (int v = 0; v < NV; ++v) acc[r][v] += a * b[v];
                }
            }
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int v = 0; v < NV; ++v) store(M + r * PW + v * VL, acc[r][v]);
}

typedef void (*Gemm)(const float*, idx, const float*, idx, float*, const float*);
template <int NV, size_t... R> static Gemm pick(idx rows, std::index_sequence<R...>) {
    static const Gemm f[] = {gemm<R + 1, NV>...};
    return f[rows - 1];
}
// The kernel for `rows` (1 .. ROWS) tiles and nv (1, 2) vectors of output channels.
static inline Gemm pick(idx rows, int nv) {
    return nv == 2 ? pick<2>(rows, std::make_index_sequence<ROWS>()) : pick<1>(rows, std::make_index_sequence<ROWS>());
}

// dU[WROWS][NV vectors] (+)= sum over n tiles of A[t][row] * B[t][vector]; A, B rows PW apart.
// The block's sum starts from zero and is added at the end: a sum of sums. Going on from the old
// value makes one chain over all tiles (16384 for 64 channels at 32x32): error 7e-6 instead of 1e-6.
template <int NV> static void outer(const float* A, const float* B, idx n, float* D, bool add) {
    vec acc[WROWS][NV] = {};
    for (idx t = 0; t < n; ++t, A += PW, B += PW) {
        vec b[NV];
        UNROLL for (int v = 0; v < NV; ++v) b[v] = load(B + v * VL);
        UNROLL for (int r = 0; r < WROWS; ++r) {
            vec a = A[r] - vec{};
            UNROLL for (int v = 0; v < NV; ++v) acc[r][v] += a * b[v];
        }
    }
    UNROLL for (int r = 0; r < WROWS; ++r)
        UNROLL for (int v = 0; v < NV; ++v) {
            float* d = D + r * PW + v * VL;
            store(d, add ? load(d) + acc[r][v] : acc[r][v]);
        }
}

// u[16] = G g G^T of nine vectors, G = [1 0 0; .5 .5 .5; .5 -.5 .5; 0 0 1].
static inline void weight_tile(const vec* g, vec* u) {
    vec e[4][3];
    UNROLL for (int b = 0; b < 3; ++b) {
        vec s = (g[b] + g[6 + b]) * .5f, h = g[3 + b] * .5f;
        e[0][b] = g[b]; e[1][b] = s + h; e[2][b] = s - h; e[3][b] = g[6 + b];
    }
    UNROLL for (int a = 0; a < 4; ++a) {
        vec s = (e[a][0] + e[a][2]) * .5f, h = e[a][1] * .5f;
        u[4 * a] = e[a][0]; u[4 * a + 1] = s + h; u[4 * a + 2] = s - h; u[4 * a + 3] = e[a][2];
    }
}

// Transposes VL x VL floats held in VL vectors: log2(VL) rounds of interleaving i with i + VL/2.
static inline void transpose(vec* r) {
    typedef int ivec __attribute__((vector_size(VL * 4)));
    ivec lo, hi;
    for (int i = 0; i < VL; ++i) { lo[i] = i / 2 + (i & 1) * VL; hi[i] = lo[i] + VL / 2; }
    UNROLL for (int round = 1; round < VL; round *= 2) {
        vec q[VL];
        UNROLL for (int i = 0; i < VL / 2; ++i) {
            q[2 * i] = __builtin_shuffle(r[i], r[i + VL / 2], lo);
            q[2 * i + 1] = __builtin_shuffle(r[i], r[i + VL / 2], hi);
        }
        UNROLL for (int i = 0; i < VL; ++i) r[i] = q[i];
    }
}

// Part `me` of `n` of the weight transform: w [K][3][3][C] -> U packed.
// flip = false (forward):        U [16][panels of K][C][PW], w transposed on the way.
// flip = true (input gradient):  U [16][panels of C][K][PW] of the rotated filter. Rotation swaps
// the points 0 and infinity, that is frequencies 0 and 3 of each axis, and nothing else.
static void weight_transform(const float* w, idx C, idx K, bool flip, float* U, idx fs,
                             int me, int n) {
    static const int swap[4] = {3, 1, 2, 0};
    vec g[9], u[16];
    if (flip) {   // units (panel, k): the sixteen output streams are contiguous
        for (idx i = up(C, PW) * K * me / n, end = up(C, PW) * K * (me + 1) / n; i < end; ++i)
            for (idx c = i / K * PW, v = 0; v < PW && c + v < C; v += VL) {
                for (int j = 0; j < 9; ++j) g[j] = load(w + (i % K * 9 + j) * C + c + v);
                weight_tile(g, u);
                for (int f = 0; f < 16; ++f)
                    store(U + i * PW + v + (swap[f / 4] * 4 + swap[f % 4]) * fs, u[f]);
            }
        return;
    }
    vec buf[2][9][VL];   // units (panel, VL input channels)
    const idx cb = C / VL, units = up(K, PW) * cb;
    for (idx i = units * me / n; i < units * (me + 1) / n; ++i) {
        const idx k = i / cb * PW, c = i % cb * VL, nv = std::min<idx>(PW, K - k) / VL;
        for (int v = 0; v < nv; ++v)
            for (int j = 0; j < 9; ++j) {
                for (int r = 0; r < VL; ++r) buf[v][j][r] = load(w + ((k + v * VL + r) * 9 + j) * C + c);
                transpose(buf[v][j]);
            }
        for (int r = 0; r < VL; ++r)
            for (int v = 0; v < nv; ++v) {
                for (int j = 0; j < 9; ++j) g[j] = buf[v][j][r];
                weight_tile(g, u);
                for (int f = 0; f < 16; ++f) store(U + (i * VL + r) * PW + v * VL + f * fs, u[f]);
            }
    }
}

// Scratch sizes in floats. tb: tiles per block; group: panels of K multiplied before they are
// transformed back, or rows of frequencies summed together. A line of padding between frequencies
// keeps the sixteen streams of a transform out of one L1 set.
struct Plan {
    idx tb, group, ufs, vfs, mfs, frequencies, copies, per_thread;
    // Up to 256 channels V (tb = 56: 0.9 MB) and one panel of M stay in L2 beside the panels of U;
    // for more, U (16 MB for 512) is read once per block, so V and M are allowed to leave L2.
    static Plan forward(const Conv& s, int threads) {
        const bool big = s.C > 256;
        return Plan(s, std::min<idx>(big ? 64 : 56, up(s.T, threads)), big ? s.kp : 1, s.kp * s.C,
                    big ? s.kp : 1, 16, 1);
    }
    // dU of the rows being summed should stay in L2: two rows of 128 channels are 0.5 MB.
    static Plan weight(const Conv& s, int threads) {
        const idx copies = std::max(1, threads / 2), rows = s.C <= 128 ? 2 : 1;
        return Plan(s, std::min<idx>(s.C <= 128 ? 96 : 64, up(s.T, copies)), rows, s.cp * s.K,
                    s.kp, 4 * rows, copies);
    }
    float* rest(float* scratch) const { return scratch + up(16 * ufs * copies, 1024) * 1024; }
    idx total(int threads) const { return up(16 * ufs * copies, 1024) * 1024 + threads * per_thread; }
private:
    Plan(const Conv& s, idx tb_, idx group_, idx urows, idx mpanels, idx f, idx n)
        : tb(tb_), group(group_), ufs((urows + 1) * PW), vfs((s.cp * tb + 1) * PW),
          mfs((mpanels * tb + 1) * PW), frequencies(f), copies(n),
          per_thread(up(f * (vfs + mfs) + s.C + s.K, 1024) * 1024) {}
};

// Part `me` of `n` of dw = G^T (sum of `splits` partial dU) G; dU [split][16][panel of C][K][PW],
// in units (panel, k) as it lies in memory.
static void weight_output(const Conv& s, const float* dU, idx fs, idx splits, float* dw, int me, int n) {
    for (idx u = s.cp * s.K * me / n, end = s.cp * s.K * (me + 1) / n; u < end; ++u)
        for (idx k = u % s.K, c = u / s.K * PW, v = 0; v < PW && c + v < s.C; v += VL) {
            vec e[4][3];
            for (int a = 0; a < 4; ++a) {
                vec m[4];
                for (int b = 0; b < 4; ++b) {
                    const float* d = dU + u * PW + v + (4 * a + b) * fs;
                    m[b] = load(d);
                    for (idx i = 1; i < splits; ++i) m[b] += load(d + i * 16 * fs);
                }
                vec h = (m[1] + m[2]) * .5f;
                e[a][0] = m[0] + h; e[a][1] = (m[1] - m[2]) * .5f; e[a][2] = h + m[3];
            }
            float* o = dw + k * 9 * s.C + c + v;
            for (int j = 0; j < 9; ++j) __builtin_prefetch(o + (4 * 9 + j) * s.C, 1);   // 4 k ahead: -5 % of 512@4
            for (int b = 0; b < 3; ++b) {
                vec h = (e[1][b] + e[2][b]) * .5f;
                store(o + b * s.C, e[0][b] + h);
                store(o + (3 + b) * s.C, (e[1][b] - e[2][b]) * .5f);
                store(o + (6 + b) * s.C, h + e[3][b]);
            }
        }
}

typedef void (*Transform)(const Conv&, const float*, idx, idx, idx, const float*, float*, idx, idx);

extern "C" {

// Floats of scratch (64-byte aligned) that winograd_forward (weight = 0) or winograd_weight (1) needs.
long winograd_scratch(int weight, long N, long H, long W, long C, long K, int threads) {
    Conv s(N, H, W, C, K);
    return (weight ? Plan::weight(s, threads) : Plan::forward(s, threads)).total(threads);
}

// y [N][H][W][K] = conv(x [N][H][W][C], w). flip = 0: w [K][3][3][C]. flip = 1: w [C][3][3][K], the
// weight of a convolution from K to C channels whose input gradient this is (x = dy, y = dx).
// Threads share the tiles; each needs all of U, which they compute together.
void winograd_forward(const float* x, const float* w, float* y, float* scratch, long N, long H,
                      long W, long C, long K, int flip, int threads) {
    const Conv s(N, H, W, C, K);
    const Plan p = Plan::forward(s, threads);
    float *U = scratch, *rest = p.rest(scratch);
#pragma omp parallel num_threads(threads)
    {
        const int me = thread_number(), n = thread_count();   // n may be less than asked for
        weight_transform(w, flip ? K : C, flip ? C : K, flip, U, p.ufs, me, n);
        float *V = rest + me * p.per_thread, *M = V + 16 * p.vfs, *zero = M + 16 * p.mfs, *dummy = zero + C;
        memset(zero, 0, C * sizeof(float));
#pragma omp barrier
        for (idx t0 = s.T * me / n, end = s.T * (me + 1) / n; t0 < end; t0 += p.tb) {
            const idx len = std::min(p.tb, end - t0), parts = up(len, ROWS);
            input_transform<0, 4>(s, x, C, t0, len, zero, V, p.tb, p.vfs);
            for (idx k0 = 0; k0 < s.kp; k0 += p.group) {
                const idx k1 = std::min(s.kp, k0 + p.group);
                for (int f = 0; f < 16; ++f)
                    for (idx k = k0; k < k1; ++k) {
                        const float* B = U + f * p.ufs + k * C * PW;
                        const float* next = k + 1 < k1 ? B + C * PW              // the panel after this
                                          : f < 15     ? U + (f + 1) * p.ufs + k0 * C * PW
                                                       : U + k1 % s.kp * C * PW;
                        for (idx g = 0; g < parts; ++g) {   // rows spread evenly: 16 = 8+8, not 14+2
                            const idx r0 = len * g / parts, r1 = len * (g + 1) / parts;
                            pick(r1 - r0, K - k * PW > VL ? 2 : 1)(
                                V + f * p.vfs + r0 * PW, p.tb * PW, B, C,
                                M + f * p.mfs + ((k - k0) * p.tb + r0) * PW,
                                g * 8 < PW ? next + g * C * 8 : B);
                        }
                    }
                output_transform(s, M, p.mfs, p.tb, t0, len, k0 * PW, std::min(K, k1 * PW), dummy, y);
            }
        }
    }
}

// dw [K][3][3][C] from x [N][H][W][C] and dy [N][H][W][K]. The rows of the 4x4 frequencies are
// divided in two halves (each needs half of the transforms and half of the sums), each half among
// threads/2 threads by tiles. An odd thread does nothing; a single thread does both halves.
void winograd_weight(const float* x, const float* dy, float* dw, float* scratch, long N, long H,
                     long W, long C, long K, int threads) {
    static const Transform in[2][4] = {   // [rows together - 1][first row]
        {input_transform<0, 1>, input_transform<1, 1>, input_transform<2, 1>, input_transform<3, 1>},
        {input_transform<0, 2>, nullptr, input_transform<2, 2>, nullptr}};
    static const Transform gr[2][4] = {
        {grad_transform<0, 1>, grad_transform<1, 1>, grad_transform<2, 1>, grad_transform<3, 1>},
        {grad_transform<0, 2>, nullptr, grad_transform<2, 2>, nullptr}};
    const Conv s(N, H, W, C, K);
    const Plan p = Plan::weight(s, threads);
    float *dU = scratch, *rest = p.rest(scratch);
#pragma omp parallel num_threads(threads)
    {
        const int me = thread_number(), n = thread_count();
        const idx splits = std::max(1, n / 2), split = me / 2;
        const int first = me % 2 * 2, last = n == 1 ? 4 : first + 2;
        float *V = rest + me * p.per_thread, *G = V + p.frequencies * p.vfs, *zero = G + p.frequencies * p.mfs;
        memset(zero, 0, std::max(C, K) * sizeof(float));
        for (int row = first; row < last && split < splits; row += p.group) {
            float* D = dU + (split * 16 + row * 4) * p.ufs;
            idx t0 = s.T * split / splits, end = s.T * (split + 1) / splits;
            bool add = false;
            do {   // at least once: a split without tiles has to write zeros
                const idx len = std::min(p.tb, end - t0);
                in[p.group - 1][row](s, x, C, t0, len, zero, V, p.tb, p.vfs);
                gr[p.group - 1][row](s, dy, K, t0, len, zero, G, p.tb, p.mfs);
                for (int f = 0; f < p.frequencies; ++f)
                    for (idx c = 0; c < s.cp; ++c)
                        for (idx k = 0; k < K; k += WROWS)
                            (C - c * PW > VL ? outer<2> : outer<1>)(
                                G + f * p.mfs + k / PW * p.tb * PW + k % PW,
                                V + f * p.vfs + c * p.tb * PW, len, D + f * p.ufs + (c * K + k) * PW, add);
                add = true;
                t0 += p.tb;
            } while (t0 < end);
        }
#pragma omp barrier
        weight_output(s, dU, p.ufs, splits, dw, me, n);
    }
}
}
