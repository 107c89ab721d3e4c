// Fused Winograd convolution for training on CPU: 3x3, stride 1 or 2, padding 1. Tensors are fp32; the
// products of the transformed tiles are fp32, or bf16 with sums in fp32.
//
//   forward         y  = A^T [ (G w G^T) .* (B^T x B) ] A           (Lavin & Gray, arXiv 1509.09308)
//   input gradient  the same with dy for x and w rotated by 180 degrees, channels swapped
//   weight gradient dw = G^T [ sum over tiles (B^T x B) .* (A dy A^T) ] G, the exact adjoint
//
// Stride 1: F(2x2,3x3) makes 2x2 outputs of 4x4 inputs with 2.25 times fewer multiplications than a
// direct convolution; F(4x4,3x3) makes 4x4 of 6x6 with 4 times fewer, but its weights are 2.25 times
// as large. Stride 2: along an axis, the first and last tap read every other input, which is F(2,2),
// and the middle tap reads the inputs between them, which is two plain products: 25 products for 2x2
// outputs, 1.44 times fewer than 36. (Tiles of 9x9 for 4x4 outputs need 1.78 times fewer products, but
// were no faster.)
// The price is the memory traffic of the transformed tiles. Everything is arranged so that it
// stays in L2: a block of tiles is transformed, multiplied and transformed back before the
// next block is touched.
//
// Layouts (float32):  x [N][H][W][C]   y, dy [N][H][W][K]   w, dw [K][3][3][C]   (channels_last)
//   V   [f][panel of C][tile][PW]     transformed input of one block of tiles, f = S*row + col
//   U   [u][panel of K][C][PW]        transformed weights
//   M   [f][panel of K][tile][PW]     products
// S is the side of a transformed tile and f one of its S*S frequencies; u is the weight of
// a frequency. Stride 2 has fewer weights, since all its plain products share one.
// bf16 products are summed in pairs: of channels c and c + 1 in V and U, of tiles t and t + 1 in the weight
// gradient's factors. Whatever is not read as such pairs already is stored interleaved.
// A panel is PW = 2 vectors of channels. Panels (instead of rows of C floats) keep every stream of
// the matrix kernels contiguous: rows of 512 floats would all map to two L1 sets.
// C and K are multiples of 16; the last panel may be half full (its stride is still PW).
//
// No state, no allocation: the caller passes scratch (see winograd_scratch). The division of
// the work and the order of partial sums are fixed, so a result depends only on the number of
// threads. No -ffast-math: NaN and Inf pass through.
#include <cstddef>
#include <cstring>
#include <algorithm>
#include <utility>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
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
typedef unsigned int pairs __attribute__((vector_size(VL * 4)));          // of bf16
typedef unsigned int pairs_u __attribute__((vector_size(VL * 4), aligned(2)));
typedef unsigned short bf16;
typedef long idx;
#define UNROLL _Pragma("GCC unroll 16")

static inline vec load(const float* p) { return *(const vec_u*)p; }
static inline void store(float* p, vec v) { *(vec_u*)p = v; }
static inline idx up(idx a, idx b) { return (a + b - 1) / b; }

// bf16 in the lower halves, rounded to the nearest even one.
static inline pairs rounded(vec v) {
#ifdef __AVX512BF16__
    return (pairs)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    const pairs bits = (pairs)v, nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : nearest;   // NaN stays NaN
#endif
}
// sum + a.low * b.low + a.high * b.high
static inline vec dot(vec sum, pairs a, pairs b) {
#ifdef __AVX512BF16__
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (vec)(a << 16) * (vec)(b << 16);
    return sum + (vec)(a & 0xffff0000) * (vec)(b & 0xffff0000);
#endif
}
static inline unsigned int pair_at(const bf16* p) {
    unsigned int both;
    memcpy(&both, p, 4);
    return both;
}

// How transformed numbers are stored: T, and how many tiles (or channels) lie beside each other.
struct Floats {
    typedef float T;
    enum { DEPTH = 1 };
    static void put(T* p, vec v, vec) { store(p, v); }
};
struct Rounded {
    typedef bf16 T;
    enum { DEPTH = 1 };
    static void put(T* p, vec v, vec) {
#ifdef __AVX512BF16__
        _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
        const pairs r = rounded(v);
        for (int i = 0; i < VL; ++i) p[i] = (bf16)r[i];
#endif
    }
};
struct Paired {
    typedef bf16 T;
    enum { DEPTH = 2 };
    static void put(T* p, vec first, vec second) { *(pairs_u*)p = rounded(first) | rounded(second) << 16; }
};

// A form of the algorithm along one axis, as the matrices of the formula at the top:
//   S lines of frequencies: the first W - 1 have a weight each, all further ones share one
//   I inputs, starting at STEP * tile - OFFSET, make O outputs, starting at O * tile
// Each form interpolates at some points and infinity. Of the known points for four outputs, these have
// the smallest errors (Barabasz et al., arXiv 1803.10986). With them, the errors of F(4,3) are 2 to 3
// times those of a direct sum (7 times with 0, 1, -1, 2, -2); the other forms add no error.
#define MATRIX(name, rows, columns, ...) \
    struct name { \
        enum { R = rows, C = columns }; \
        static constexpr float at(int i, int j) { \
            constexpr float v[rows][columns] = __VA_ARGS__; \
            return v[i][j]; \
        } \
    }
template <int M> struct Unit;   // stride 1, both directions
template <> struct Unit<2> {    // F(2,3): 0, 1, -1
    enum { S = 4, W = 4, I = 4, STEP = 2, OFFSET = 1, O = 2 };
    MATRIX(BT, 4, 4, {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}});
    MATRIX(G, 4, 3, {{1, 0, 0}, {.5f, .5f, .5f}, {.5f, -.5f, .5f}, {0, 0, 1}});
    MATRIX(AT, 2, 4, {{1, 1, 1, 0}, {0, 1, -1, -1}});
};
template <> struct Unit<4> {    // F(4,3): 0, 2/3, -2/3, 3/2, -3/2
    enum { S = 6, W = 6, I = 6, STEP = 4, OFFSET = 1, O = 4 };
    MATRIX(BT, 6, 6, {{1, 0, -97 / 36.f, 0, 1, 0}, {0, -3 / 2.f, -9 / 4.f, 2 / 3.f, 1, 0},
                      {0, 3 / 2.f, -9 / 4.f, -2 / 3.f, 1, 0}, {0, -2 / 3.f, -4 / 9.f, 3 / 2.f, 1, 0},
                      {0, 2 / 3.f, -4 / 9.f, -3 / 2.f, 1, 0}, {0, 1, 0, -97 / 36.f, 0, 1}});
    MATRIX(G, 6, 3, {{1, 0, 0}, {-81 / 130.f, -54 / 130.f, -36 / 130.f}, {-81 / 130.f, 54 / 130.f, -36 / 130.f},
                     {16 / 130.f, 24 / 130.f, 36 / 130.f}, {16 / 130.f, -24 / 130.f, 36 / 130.f}, {0, 0, 1}});
    MATRIX(AT, 4, 6, {{1, 1, 1, 1, 1, 0}, {0, 2 / 3.f, -2 / 3.f, 3 / 2.f, -3 / 2.f, 0},
                      {0, 4 / 9.f, 4 / 9.f, 9 / 4.f, 9 / 4.f, 0}, {0, 8 / 27.f, -8 / 27.f, 27 / 8.f, -27 / 8.f, 1}});
};
// Stride 2 forward, from five inputs: F(2,2) at 0 and 1 on the even ones, plain products on the odd ones.
struct Strided {
    enum { S = 5, W = 4, I = 5, STEP = 4, OFFSET = 1, O = 2 };
    MATRIX(BT, 5, 5, {{1, 0, -1, 0, 0}, {0, 0, 1, 0, 0}, {0, 0, -1, 0, 1}, {0, 1, 0, 0, 0}, {0, 0, 0, 1, 0}});
    MATRIX(G, 4, 3, {{1, 0, 0}, {1, 0, 1}, {0, 0, 1}, {0, 1, 0}});
    MATRIX(AT, 2, 5, {{1, 1, 0, 1, 0}, {0, 1, 1, 0, 1}});
};
// Its input gradient: four inputs from three output gradients, the odd ones by F(2,2) with reversed taps,
// the even ones by the middle tap.
struct StridedBack {
    enum { S = 5, W = 4, I = 3, STEP = 2, OFFSET = 0, O = 4 };
    MATRIX(BT, 5, 3, {{1, -1, 0}, {0, 1, 0}, {0, -1, 1}, {1, 0, 0}, {0, 1, 0}});
    typedef Strided::G G;
    MATRIX(AT, 4, 5, {{0, 0, 0, 1, 0}, {1, 1, 0, 0, 0}, {0, 0, 0, 0, 1}, {0, 1, 1, 0, 0}});
};
// The weight of frequency f.
template <class Form> static inline int weight_of(int f) {
    const int last = Form::W - 1;
    return std::min(f / Form::S, last) * Form::W + std::min(f % Form::S, last);
}
template <class Matrix> struct Transposed {
    enum { R = Matrix::C, C = Matrix::R };
    static constexpr float at(int i, int j) { return Matrix::at(j, i); }
};

// Line I of a matrix times d, from column J on. Skips coefficients of 0, and does not multiply by 1 or -1.
template <class Matrix, int I, int J> static inline vec add(vec sum, const vec* d) {
    if constexpr (J == Matrix::C) return sum;
    else {
        constexpr float k = Matrix::at(I, J);
        if constexpr (k == 0) return add<Matrix, I, J + 1>(sum, d);
        else if constexpr (k == 1) return add<Matrix, I, J + 1>(sum + d[J], d);
        else if constexpr (k == -1) return add<Matrix, I, J + 1>(sum - d[J], d);
        else return add<Matrix, I, J + 1>(sum + k * d[J], d);
    }
}
template <class Matrix, int I, int J = 0> static inline vec line(const vec* d) {
    constexpr float k = Matrix::at(I, J);
    if constexpr (k == 0) return line<Matrix, I, J + 1>(d);
    else if constexpr (k == 1) return add<Matrix, I, J + 1>(d[J], d);
    else if constexpr (k == -1) return add<Matrix, I, J + 1>(-d[J], d);
    else return add<Matrix, I, J + 1>(k * d[J], d);
}
template <class Matrix, int I0, size_t... I>
static inline void lines(const vec* d, vec* out, std::index_sequence<I...>) {
    ((out[I] = line<Matrix, I0 + (int)I>(d)), ...);
}
// Lines I0 .. I0+NR-1 of a matrix times d.
template <class Matrix, int I0 = 0, int NR = Matrix::R> static inline void lines(const vec* d, vec* out) {
    lines<Matrix, I0>(d, out, std::make_index_sequence<NR>());
}

// Shape of one convolution from H x W x C to P x Q x K; th, tw: tiles of o x o outputs per image. A
// tile that extends beyond the border reads zeros, and its surplus outputs go to a dummy.
struct Conv {
    idx N, H, W, C, P, Q, K, th, tw, T, cp, kp;
    Conv(idx o, idx n, idx h, idx w, idx c, idx p, idx q, idx k)
        : N(n), H(h), W(w), C(c), P(p), Q(q), K(k), th(up(p, o)), tw(up(q, o)), T(n * th * tw),
          cp(up(c, PW)), kp(up(k, PW)) {}
};

// Walks over tiles in order without a division per tile.
struct Tile {
    const Conv& s; idx n, i, j;
    Tile(const Conv& s_, idx t) : s(s_), n(t / (s_.th * s_.tw)), i(t / s_.tw % s_.th), j(t % s_.tw) {}
    void next() { if (++j == s.tw) { j = 0; if (++i == s.th) { i = 0; ++n; } } }
    // Pointers to SIZE x SIZE pixels from (STEP*i-off, STEP*j-off) of img [N][h][w][chan]; outside: `none`.
    template <int SIZE, int STEP> void pixels(const float* img, idx h, idx w, idx chan, int off,
                                              const float* none, const float** p) const {
        idx h0 = STEP * i - off, w0 = STEP * j - off;
        const float* base = img + ((n * h + h0) * w + w0) * chan;
        for (int a = 0; a < SIZE; ++a)
            for (int b = 0; b < SIZE; ++b)
                p[a * SIZE + b] = (size_t)(h0 + a) < (size_t)h && (size_t)(w0 + b) < (size_t)w
                                      ? base + (a * w + b) * chan : none;
    }
};

// What is transformed: the inputs x [N][H][W][C] by B^T, or the output gradients dy [N][P][Q][K] by A.
template <class Form> struct Inputs {
    enum { SIDE = Form::I, STEP = Form::STEP, OFFSET = Form::OFFSET };
    typedef typename Form::BT Matrix;
    idx h, w, channels;
    Inputs(const Conv& s) : h(s.H), w(s.W), channels(s.C) {}
};
template <class Form> struct Gradients {
    enum { SIDE = Form::O, STEP = Form::O, OFFSET = 0 };
    typedef Transposed<typename Form::AT> Matrix;
    idx h, w, channels;
    Gradients(const Conv& s) : h(s.P), w(s.Q), channels(s.K) {}
};

// V = B^T x B, or A dy A^T, of `len` tiles from t0 on, rows I0 .. I0+NR-1 of the S x S frequencies:
// x -> V [NR*S][panels][stride tiles][PW], frequencies fs numbers apart, stored as Out.
// zero: zeros for all channels of a pixel outside the image.
template <class Form, class From, class Out, int I0, int NR> static void transform(const Conv& s,
        const float* x, idx t0, idx len, const float* zero, typename Out::T* V, idx stride, idx fs) {
    enum { S = Form::S, I = From::SIDE, DEPTH = Out::DEPTH };
    typedef typename From::Matrix Matrix;
    const From from(s);
    Tile tile(s, t0);
    for (idx t = 0; t < len; t += DEPTH) {
        const float* p[DEPTH][I * I];
        UNROLL for (int u = 0; u < DEPTH; ++u, tile.next()) {
            if (t + u < len) tile.pixels<I, From::STEP>(x, from.h, from.w, from.channels, From::OFFSET, zero, p[u]);
            else std::fill(p[u], p[u] + I * I, zero);
        }
        for (idx c = 0; c < from.channels; c += VL) {
            auto v = V + (c / PW * stride + t) * PW + c % PW * DEPTH;
            vec e[DEPTH][I][NR], d[I], o[DEPTH][S];
            UNROLL for (int u = 0; u < DEPTH; ++u)
                UNROLL for (int b = 0; b < I; ++b) {
                    UNROLL for (int a = 0; a < I; ++a) d[a] = load(p[u][a * I + b] + c);
                    lines<Matrix, I0, NR>(d, e[u][b]);
                }
            UNROLL for (int a = 0; a < NR; ++a) {
                UNROLL for (int u = 0; u < DEPTH; ++u) {
                    UNROLL for (int b = 0; b < I; ++b) d[b] = e[u][b][a];
                    lines<Matrix>(d, o[u]);
                }
                UNROLL for (int b = 0; b < S; ++b) Out::put(v + (S * a + b) * fs, o[0][b], o[DEPTH - 1][b]);
            }
        }
    }
}

// y = A^T M A for `len` tiles and the channels k0 .. k1: m [S*S][panels][stride tiles][PW].
template <class Form> static void output_transform(const Conv& s, const float* products, idx fs, idx stride,
                                                   idx t0, idx len, idx k0, idx k1, float* dummy, float* y) {
    enum { S = Form::S, O = Form::O };
    Tile tile(s, t0);
    for (idx t = 0; t < len; ++t, tile.next()) {
        const float* p[O * O];
        tile.pixels<O, O>(y, s.P, s.Q, s.K, 0, dummy, p);
        for (idx k = k0; k < k1; k += VL) {
            const float* m = products + ((k - k0) / PW * stride + t) * PW + (k - k0) % PW;
            vec e[S][O], d[S], o[O];
            UNROLL for (int b = 0; b < S; ++b) {
                UNROLL for (int a = 0; a < S; ++a) d[a] = load(m + (S * a + b) * fs);
                lines<typename Form::AT>(d, e[b]);
            }
            UNROLL for (int a = 0; a < O; ++a) {
                UNROLL for (int b = 0; b < S; ++b) d[b] = e[b][a];
                lines<typename Form::AT>(d, o);
                UNROLL for (int b = 0; b < O; ++b) store((float*)p[O * a + b] + k, o[b]);
            }
        }
    }
}

// M[R][PW] = sum over c of A[c][row] * B[c][NV vectors]: A in panels [panel][stride tiles][PW]
// (the broadcast operand), B packed [C][PW]. All R*NV sums stay in registers. Meanwhile it
// prefetches C*8 floats at `next` into L2, two lines per 4 steps: the weights of 256 or more channels
// come from L3, and the processor's own prefetch stops at each page (10 % faster there, free elsewhere).
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

// The same with bf16 products: B packed [C/2][PW][2].
template <int R, int NV> static void gemm(const bf16* A, idx astep, const bf16* B, idx C, float* M,
                                          const bf16* next) {
    vec acc[R][NV] = {};
    for (idx c = 0; c < C; c += PW, A += astep) {
        idx n = std::min<idx>(PW, C - c);
        for (idx k = 0; k < n; k += 4, B += 4 * PW, next += 32) {
            __builtin_prefetch(next, 0, 2);
            UNROLL for (int j = 0; j < 4; j += 2) {
                pairs b[NV];
                UNROLL for (int v = 0; v < NV; ++v) b[v] = *(const pairs_u*)(B + j * PW + v * VL * 2);
                UNROLL for (int r = 0; r < R; ++r) {
                    const pairs a = pair_at(A + r * PW + k + j) - pairs{};
                    UNROLL for (int v = 0; v < NV; ++v) acc[r][v] = dot(acc[r][v], a, b[v]);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int v = 0; v < NV; ++v) store(M + r * PW + v * VL, acc[r][v]);
}

template <class T> using Gemm = void (*)(const T*, idx, const T*, idx, float*, const T*);
template <class T, int NV, size_t... R> static Gemm<T> pick(idx rows, std::index_sequence<R...>) {
    static const Gemm<T> f[] = {gemm<R + 1, NV>...};
    return f[rows - 1];
}
// The kernel for `rows` (1 .. ROWS) tiles and nv (1, 2) vectors of output channels.
template <class T> static inline Gemm<T> pick(idx rows, int nv) {
    const std::make_index_sequence<ROWS> all;
    return nv == 2 ? pick<T, 2>(rows, all) : pick<T, 1>(rows, all);
}

// dU[WROWS][NV vectors] (+)= sum over n tiles of A[t][row] * B[t][vector]; A, B rows PW apart.
// The sum of a block starts from zero and is added at the end: a sum of sums. Continuing the old sum
// would make one chain over all tiles (16384 for 64 channels at 32x32): error 7e-6 instead of 1e-6.
template <int NV> static void add_sums(vec (*acc)[NV], float* D, bool add) {
    UNROLL for (int r = 0; r < WROWS; ++r)
        UNROLL for (int v = 0; v < NV; ++v) {
            float* d = D + r * PW + v * VL;
            store(d, add ? load(d) + acc[r][v] : acc[r][v]);
        }
}
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
    add_sums<NV>(acc, D, add);
}
template <int NV> static void outer(const bf16* A, const bf16* B, idx n, float* D, bool add) {
    vec acc[WROWS][NV] = {};
    for (idx t = 0; t < n; t += 2, A += 2 * PW, B += 2 * PW) {
        pairs b[NV];
        UNROLL for (int v = 0; v < NV; ++v) b[v] = *(const pairs_u*)(B + v * VL * 2);
        UNROLL for (int r = 0; r < WROWS; ++r) {
            const pairs a = pair_at(A + r * 2) - pairs{};
            UNROLL for (int v = 0; v < NV; ++v) acc[r][v] = dot(acc[r][v], a, b[v]);
        }
    }
    add_sums<NV>(acc, D, add);
}

template <class T> static inline void outer(int nv, const T* A, const T* B, idx n, float* D, bool add) {
    nv == 2 ? outer<2>(A, B, n, D, add) : outer<1>(A, B, n, D, add);
}

// u[W*W] = G g G^T of nine vectors.
template <class Form> static inline void weight_tile(const vec* g, vec* u) {
    enum { W = Form::W };
    typedef typename Form::G G;
    vec e[3][W];
    UNROLL for (int b = 0; b < 3; ++b) {
        const vec d[3] = {g[b], g[3 + b], g[6 + b]};
        lines<G>(d, e[b]);
    }
    UNROLL for (int a = 0; a < W; ++a) {
        const vec d[3] = {e[0][a], e[1][a], e[2][a]};
        lines<G>(d, u + W * a);
    }
}

// Transposes VL x VL floats in VL vectors: log2(VL) rounds of interleaving i with i + VL/2.
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
// flip = false (forward):        U [W*W][panels of K][C][PW], w transposed on the way.
// flip = true (input gradient):  U [W*W][panels of C][K][PW] of the rotated filter.
template <class Form, class Out> static void weight_transform(const float* w, idx C, idx K, bool flip,
                                                         typename Out::T* U, idx fs, int me, int n) {
    enum { F = Form::W * Form::W, DEPTH = Out::DEPTH };
    vec g[9], u[DEPTH][F];
    if (flip) {   // units (panel, DEPTH of k): the output streams are contiguous
        const idx rows = K / DEPTH;
        for (idx i = up(C, PW) * rows * me / n, end = up(C, PW) * rows * (me + 1) / n; i < end; ++i)
            for (idx c = i / rows * PW, v = 0; v < PW && c + v < C; v += VL) {
                for (int d = 0; d < DEPTH; ++d) {
                    const float* from = w + (i % rows * DEPTH + d) * 9 * C + c + v;
                    for (int j = 0; j < 9; ++j) g[j] = load(from + (8 - j) * C);
                    weight_tile<Form>(g, u[d]);
                }
                for (int f = 0; f < F; ++f)
                    Out::put(U + (i * PW + v) * DEPTH + f * fs, u[0][f], u[DEPTH - 1][f]);
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
        for (int r = 0; r < VL; r += DEPTH)
            for (int v = 0; v < nv; ++v) {
                for (int d = 0; d < DEPTH; ++d) {
                    for (int j = 0; j < 9; ++j) g[j] = buf[v][j][r + d];
                    weight_tile<Form>(g, u[d]);
                }
                for (int f = 0; f < F; ++f)
                    Out::put(U + (i * VL + r) * PW + v * VL * DEPTH + f * fs, u[0][f], u[DEPTH - 1][f]);
            }
    }
}

// Which products: how one tile after another is stored for them, and how pairs are.
struct Fp32 { typedef Floats Row, Deep; };
struct Bf16 { typedef Rounded Row; typedef Paired Deep; };

// Scratch sizes in floats. tb: tiles per block; group: panels of K multiplied before they are
// transformed back, or rows of frequencies summed together. A cache line of padding between
// frequencies keeps the streams of a transform from sharing one L1 set.
struct Plan {
    idx tb, group, ufs, vfs, mfs, frequencies, copies, per_thread;
    bool shared;   // whether all threads work on the same block
    // V (up to 0.9 MB, in blocks of whole ROWS) and one panel of M stay in L2 beside the panels of U.
    // With more channels, U (16 MB for 512 of F(2,3)) is read once per block, so V and M may leave
    // L2. If the panels can be divided among the threads, all threads then work on one block, each on
    // its own panels: every part of U is read by only one thread, mostly the one that wrote it.
    template <class Form, class Kind> static Plan forward(const Conv& s, int threads) {
        const idx size = sizeof(typename Kind::Row::T);
        const idx f = Form::S * Form::S, most = 920000 / (size * f * s.C) / ROWS * ROWS;
        const bool big = most < 3 * ROWS, shared = big && (s.kp % threads == 0 || s.kp >= 4 * threads);
        const idx tb = shared ? std::min<idx>(128, s.T)
                              : std::min<idx>(big ? 64 : std::min<idx>(most, 56), up(s.T, threads));
        return Plan(s, tb, big ? s.kp : 1, s.kp * s.C, big ? up(s.kp, shared ? threads : 1) : 1,
                    Form::W * Form::W, f, 1, shared, size, size, sizeof(float));
    }
    // dU of the rows being summed should stay in L2: two rows of F(2,3) and 128 channels are 0.5 MB.
    template <class Form, class Kind> static Plan weight(const Conv& s, int threads) {
        const idx size = sizeof(typename Kind::Deep::T);
        const idx copies = std::max(1, threads / 2), small = std::max(s.C, s.K);
        const bool halves = Form::S % 2 == 0 && small <= (Form::S == 4 ? 128 : 64);
        const idx rows = halves ? Form::S / 2 : 1;
        return Plan(s, std::min<idx>(small <= 128 ? 96 : 64, up(up(s.T, copies), 2) * 2), rows, s.cp * s.K,
                    s.kp, Form::W * Form::W, Form::S * rows, copies, false, sizeof(float), size, size);
    }
    // Of thread `me`.
    float* own(float* scratch, int me) const { return scratch + weights + block + me * per_thread; }
    idx total(int threads) const { return weights + block + threads * per_thread; }
    float* shared_block(float* scratch) const { return scratch + weights; }
private:
    idx weights, block;
    static idx pages(idx bytes) { return up(bytes, 4096) * 1024; }
    // usize, vsize, msize: bytes of a number in U (or dU), V and M (or the other factor).
    Plan(const Conv& s, idx tb_, idx group_, idx urows, idx mpanels, idx all, idx f, idx n, bool shared_,
         idx usize, idx vsize, idx msize)
        : tb(tb_), group(group_), ufs((urows + 1) * PW), vfs((s.cp * tb + 1) * PW),
          mfs((mpanels * tb + 1) * PW), frequencies(f), copies(n),
          per_thread(pages(f * ((shared_ ? 0 : vfs * vsize) + mfs * msize) + (s.C + s.K) * 4)),
          shared(shared_), weights(pages(all * ufs * copies * usize)),
          block(shared_ ? pages(f * vfs * vsize) : 0) {}
};

// Part `me` of `n` of dw = G^T (sum of `splits` partial dU) G; dU [split][W*W][panel of C][K][PW],
// in units (panel, k), in memory order.
template <class Form> static void weight_output(const Conv& s, const float* dU, idx fs, idx splits,
                                                float* dw, int me, int n) {
    enum { W = Form::W };
    typedef Transposed<typename Form::G> GT;
    for (idx u = s.cp * s.K * me / n, end = s.cp * s.K * (me + 1) / n; u < end; ++u)
        for (idx k = u % s.K, c = u / s.K * PW, v = 0; v < PW && c + v < s.C; v += VL) {
            vec e[W][3];
            for (int b = 0; b < W; ++b) {
                vec m[W];
                for (int a = 0; a < W; ++a) {
                    const float* d = dU + u * PW + v + (W * a + b) * fs;
                    m[a] = load(d);
                    for (idx i = 1; i < splits; ++i) m[a] += load(d + i * W * W * fs);
                }
                lines<GT>(m, e[b]);
            }
            float* o = dw + k * 9 * s.C + c + v;
            for (int j = 0; j < 9; ++j) __builtin_prefetch(o + (4 * 9 + j) * s.C, 1);   // 4 k ahead: -5 % of 512@4
            for (int a = 0; a < 3; ++a) {
                vec d[W], w[3];
                for (int b = 0; b < W; ++b) d[b] = e[b][a];
                lines<GT>(d, w);
                for (int b = 0; b < 3; ++b) store(o + (3 * a + b) * s.C, w[b]);
            }
        }
}

template <class Out> using Transform = void (*)(const Conv&, const float*, idx, idx, const float*,
                                              typename Out::T*, idx, idx);
// The transforms of NR rows of frequencies, indexed by the first row divided by NR.
template <class Form, class Out, int NR, size_t... I> static void pick_rows(
        idx i, Transform<Out>* in, Transform<Out>* gr, std::index_sequence<I...>) {
    static const Transform<Out> ins[] = {transform<Form, Inputs<Form>, Out, (int)I * NR, NR>...};
    static const Transform<Out> grs[] = {transform<Form, Gradients<Form>, Out, (int)I * NR, NR>...};
    *in = ins[i];
    *gr = grs[i];
}
template <class Form, class Out, int NR> static void pick_rows(idx first, Transform<Out>* in, Transform<Out>* gr) {
    pick_rows<Form, Out, NR>(first / NR, in, gr, std::make_index_sequence<Form::S / NR>());
}

// See winograd_forward. Threads divide the tiles, or the output channels of each block of tiles; they
// compute U together.
template <class Form, class Kind> static void forward(const Conv& s, const float* x, const float* w, float* y,
                                                      float* scratch, int flip, int threads) {
    enum { F = Form::S * Form::S };
    typedef typename Kind::Row Row;
    typedef typename Row::T T;
    const Plan p = Plan::forward<Form, Kind>(s, threads);
    const idx C = s.C, K = s.K;
    T* U = (T*)scratch;
#pragma omp parallel num_threads(threads)
    {
        const int me = thread_number(), n = thread_count();   // n may be less than requested
        weight_transform<Form, typename Kind::Deep>(w, flip ? K : C, flip ? C : K, flip, U, p.ufs, me, n);
        float* own = p.own(scratch, me);
        T* V = (T*)(p.shared ? p.shared_block(scratch) : own);
        float *P = p.shared ? own : (float*)(V + F * p.vfs);
        float *zero = P + F * p.mfs, *dummy = zero + C;
        memset(zero, 0, C * sizeof(float));
#pragma omp barrier
        const idx begin = p.shared ? 0 : s.T * me / n, end = p.shared ? s.T : s.T * (me + 1) / n;
        const idx first = p.shared ? s.kp * me / n : 0, last = p.shared ? s.kp * (me + 1) / n : s.kp;
        for (idx t0 = begin; t0 < end; t0 += p.tb) {
            const idx len = std::min(p.tb, end - t0), parts = up(len, ROWS);
            if (p.shared) {
                const idx mine = len * me / n, count = len * (me + 1) / n - mine;
                transform<Form, Inputs<Form>, Row, 0, Form::S>(s, x, t0 + mine, count, zero, V + mine * PW, p.tb, p.vfs);
#pragma omp barrier
            } else {
                transform<Form, Inputs<Form>, Row, 0, Form::S>(s, x, t0, len, zero, V, p.tb, p.vfs);
            }
            for (idx k0 = first; k0 < last; k0 += p.group) {
                const idx k1 = std::min(last, k0 + p.group);
                for (int f = 0; f < F; ++f)
                    for (idx k = k0; k < k1; ++k) {
                        const T* B = U + weight_of<Form>(f) * p.ufs + k * C * PW;
                        const T* next = k + 1 < k1 ? B + C * PW              // the panel after this
                                          : f < F - 1  ? U + weight_of<Form>(f + 1) * p.ufs + k0 * C * PW
                                          : k1 < last  ? U + k1 * C * PW : U + first * C * PW;
                        for (idx g = 0; g < parts; ++g) {   // rows spread evenly: 16 = 8+8, not 14+2
                            const idx r0 = len * g / parts, r1 = len * (g + 1) / parts;
                            pick<T>(r1 - r0, K - k * PW > VL ? 2 : 1)(
                                V + f * p.vfs + r0 * PW, p.tb * PW, B, C,
                                P + f * p.mfs + ((k - k0) * p.tb + r0) * PW,
                                g * 8 < PW ? next + g * C * 8 : B);
                        }
                    }
                output_transform<Form>(s, P, p.mfs, p.tb, t0, len, k0 * PW, std::min(K, k1 * PW), dummy, y);
            }
            if (p.shared) {
#pragma omp barrier
            }
        }
    }
}

// See winograd_weight. The rows of the frequencies are divided in two halves (each needs half of the
// transforms and half of the sums; rows that share a weight are in one half), each half among
// threads/2 threads by tiles. An odd thread does nothing; a single thread does both halves.
template <class Form, class Kind> static void weight(const Conv& s, const float* x, const float* dy, float* dw,
                                                     float* scratch, int threads) {
    typedef typename Kind::Deep Deep;
    enum { S = Form::S, W = Form::W, DEPTH = Deep::DEPTH };
    const Plan p = Plan::weight<Form, Kind>(s, threads);
    const idx C = s.C, K = s.K;
    float* dU = scratch;
#pragma omp parallel num_threads(threads)
    {
        const int me = thread_number(), n = thread_count();
        const idx splits = std::max(1, n / 2), split = me / 2;
        const int half = (S + 1) / 2, first = me % 2 * half, last = n == 1 || me % 2 ? S : half;
        auto V = (typename Deep::T*)p.own(scratch, me), G = V + p.frequencies * p.vfs;
        float* zero = (float*)(G + p.frequencies * p.mfs);
        memset(zero, 0, std::max(C, K) * sizeof(float));
        for (int row = first; row < last && split < splits; row += p.group) {
            Transform<Deep> in, gr;
            p.group == 1 ? pick_rows<Form, Deep, 1>(row, &in, &gr)
                         : pick_rows<Form, Deep, S % 2 ? 1 : S / 2>(row, &in, &gr);
            idx t0 = s.T * split / splits, end = s.T * (split + 1) / splits;
            bool more = false;
            do {   // at least once: even a split without tiles must write zeros
                const idx len = std::min(p.tb, end - t0);
                in(s, x, t0, len, zero, V, p.tb, p.vfs);
                gr(s, dy, t0, len, zero, G, p.tb, p.mfs);
                for (int f = 0; f < p.frequencies; ++f) {
                    const int r = row + f / S;
                    const bool add = more || r >= W || f % S >= W;   // to earlier rows with the same weight
                    float* D = dU + (split * W * W + weight_of<Form>(r * S + f % S)) * p.ufs;
                    for (idx c = 0; c < s.cp; ++c)
                        for (idx k = 0; k < K; k += WROWS)
                            outer(C - c * PW > VL ? 2 : 1,
                                G + f * p.mfs + k / PW * p.tb * PW + k % PW * DEPTH,
                                V + f * p.vfs + c * p.tb * PW, len, D + (c * K + k) * PW, add);
                }
                more = true;
                t0 += p.tb;
            } while (t0 < end);
        }
#pragma omp barrier
        weight_output<Form>(s, dU, p.ufs, splits, dw, me, n);
    }
}

// Calls f with the form for a stride and a side of tiles, and the kind of products, as values of their types.
template <class F> static void with_form(int stride, int tile, bool back, int in_bf16, F f) {
    const auto with_kind = [&](auto form) { in_bf16 ? f(form, Bf16()) : f(form, Fp32()); };
    if (stride == 1) tile == 2 ? with_kind(Unit<2>()) : with_kind(Unit<4>());
    else back ? with_kind(StridedBack()) : with_kind(Strided());
}
static idx strided(idx side, int stride) { return (side - 1) / stride + 1; }
// The shape, with H x W as the larger side: the input, or with `back` the output.
template <class Form> static Conv shape(int stride, bool back, idx N, idx H, idx W, idx C, idx K) {
    const idx h = strided(H, stride), w = strided(W, stride);
    return back ? Conv(Form::O, N, h, w, C, H, W, K) : Conv(Form::O, N, H, W, C, h, w, K);
}

extern "C" {

// In all of these, the convolution is from N images of H x W pixels to N of strided(H) x strided(W).

// The faster side of output tiles, 2 or 4, for maps of this shape: 4 if the border wastes little and
// enough tiles share the work on its larger weights (measured speed-up by 4, 512 channels:
// winograd_forward 0.9 to 1 for 32 tiles, 1.0 to 1.2 for 64, 1.1 to 1.6 for 128; winograd_weight 1.1
// to 1.5 from 32 tiles on).
int winograd_tile(int weights, int stride, long N, long H, long W) {
    const idx two = N * up(H, 2) * up(W, 2), four = N * up(H, 4) * up(W, 4);
    return stride == 1 && 36 * four <= 12 * two && four >= (weights ? 32 : 64) ? 4 : 2;
}

// Floats of scratch (64-byte aligned) that winograd_forward (weights = 0) or winograd_weight (1) needs.
long winograd_scratch(int weights, int in_bf16, int stride, int tile, long N, long H, long W, long C, long K,
                      int back, int threads) {
    idx total = 0;
    with_form(stride, tile, back, in_bf16, [&](auto form, auto kind) {
        typedef decltype(form) Form;
        typedef decltype(kind) Kind;
        const Conv s = shape<Form>(stride, back, N, H, W, C, K);
        total = (weights ? Plan::weight<Form, Kind>(s, threads) : Plan::forward<Form, Kind>(s, threads)).total(threads);
    });
    return total;
}

// y [N][H'][W'][K] = conv(x [N][H][W][C], w [K][3][3][C]); or with back = 1 the input gradient
// y [N][H][W][K] of x = dy [N][H'][W'][C], w [C][3][3][K] being the convolution's from K to C.
void winograd_forward(const float* x, const float* w, float* y, float* scratch, int in_bf16, int stride,
                      int tile, long N, long H, long W, long C, long K, int back, int threads) {
    with_form(stride, tile, back, in_bf16, [&](auto form, auto kind) {
        typedef decltype(form) Form;
        forward<Form, decltype(kind)>(shape<Form>(stride, back, N, H, W, C, K), x, w, y, scratch, back, threads);
    });
}

// dw [K][3][3][C] from x [N][H][W][C] and dy [N][H'][W'][K].
void winograd_weight(const float* x, const float* dy, float* dw, float* scratch, int in_bf16, int stride,
                     int tile, long N, long H, long W, long C, long K, int threads) {
    with_form(stride, tile, false, in_bf16, [&](auto form, auto kind) {
        typedef decltype(form) Form;
        weight<Form, decltype(kind)>(shape<Form>(stride, false, N, H, W, C, K), x, dy, dw, scratch, threads);
    });
}
}
