/* Chains of element-wise operations, each in one pass over memory, for float32 and bfloat16.

   Compiled and called by kernels.py, on the CPU that runs it. Rows are shared among threads; the compiler vectorises
   within a row. Everything is computed in float32; in 16 bits the layers of transformers round on the way too, and so
   does the forward pass here, to the same numbers. Arrays are dense and row-major where no strides are given. */
#ifndef T
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef long long count;

/* Below so many numbers a second thread costs more than it saves. */
#define FEW 32768

/* A sum in this many parts, so that it can be vectorised and its error grows with fewer terms. */
#define LANES 32

static inline float widen_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

/* To the nearest, ties to even, as torch rounds. */
static inline bf16 narrow_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bf16)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline float widen_f32(float x) { return x; }
static inline float narrow_f32(float x) { return x; }

/* e^x to 1e-7 relative, within what float32 holds: 2^n e^r with |r| <= ln 2 / 2, and the series of e^r. */
static inline float exponential(float x) {
    x = x > -87.0f ? x : -87.0f;
    x = x < 88.0f ? x : 88.0f;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = (p * r) * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* 1 / (1 + e^-x), 0 where e^-x is more than float32 holds. Made 0 bit by bit: no compiler may take a product with it for
   0 then, so that what is no number stays none, whichever way the comparison falls for it. */
static inline float sigmoid_of(float x) {
    float s = 1.0f / (1.0f + exponential(-x));
    uint32_t bits;
    memcpy(&bits, &s, 4);
    bits &= -(uint32_t)(x >= -88.0f);
    memcpy(&s, &bits, 4);
    return s;
}

/* All of the rest twice. */
#define T bf16
#define F(name) name##_bf16
#define WIDEN widen_bf16
#define NARROW narrow_bf16
#include "kernels.c"
#undef T
#undef F
#undef WIDEN
#undef NARROW
#define T float
#define F(name) name##_f32
#define WIDEN widen_f32
#define NARROW narrow_f32
#include "kernels.c"

#else

static void F(gate_row)(const T *restrict gate, const T *restrict up, T *restrict y, count width) {
    for (count i = 0; i < width; i++) {
        float g = WIDEN(gate[i]);
        float silu = WIDEN(NARROW(g * sigmoid_of(g)));
        y[i] = NARROW(silu * WIDEN(up[i]));
    }
}

/* y = up * silu(gate), with gate and up the halves of a row of x. */
void F(gate)(const T *x, T *y, count rows, count width, count threads) {
#pragma omp parallel for num_threads(rows * width > FEW ? threads : 1)
    for (count row = 0; row < rows; row++)
        F(gate_row)(x + row * 2 * width, x + row * 2 * width + width, y + row * width, width);
}

static void F(gate_backward_row)(const T *restrict dy, const T *restrict gate, const T *restrict up,
                                T *restrict d_gate, T *restrict d_up, count width) {
    for (count i = 0; i < width; i++) {
        float g = WIDEN(gate[i]), d = WIDEN(dy[i]);
        float sigmoid = sigmoid_of(g), silu = g * sigmoid;
        d_up[i] = NARROW(d * silu);
        d_gate[i] = NARROW(d * WIDEN(up[i]) * (sigmoid + silu * (1.0f - sigmoid)));
    }
}

void F(gate_backward)(const T *dy, const T *x, T *dx, count rows, count width, count threads) {
#pragma omp parallel for num_threads(rows * width > FEW ? threads : 1)
    for (count row = 0; row < rows; row++) {
        const T *gate = x + row * 2 * width;
        T *d_gate = dx + row * 2 * width;
        F(gate_backward_row)(dy + row * width, gate, gate + width, d_gate, d_gate + width, width);
    }
}

static void F(normalize_row)(const T *restrict x, const T *restrict weight, T *restrict y, float rstd, count width) {
    for (count i = 0; i < width; i++)
        y[i] = NARROW(WIDEN(weight[i]) * WIDEN(NARROW(WIDEN(x[i]) * rstd)));
}

/* y = weight * x * rstd, rounded as the layer does: its sums of squares are torch's, for the same bits. */
void F(normalize)(const T *x, const float *rstd, const T *weight, T *y, count rows, count width, count threads) {
#pragma omp parallel for num_threads(rows * width > FEW ? threads : 1)
    for (count row = 0; row < rows; row++)
        F(normalize_row)(x + row * width, weight, y + row * width, rstd[row], width);
}

static void F(normalize_backward_row)(const T *restrict dy, const T *restrict x, const T *restrict weight, float rstd,
                                    T *restrict dx, count width) {
    float sums[LANES] = {0}, sum = 0;
    count whole = width - width % LANES;
    for (count i = 0; i < whole; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            sums[lane] += WIDEN(dy[i + lane]) * WIDEN(weight[i + lane]) * WIDEN(x[i + lane]);
    for (count i = whole; i < width; i++) sum += WIDEN(dy[i]) * WIDEN(weight[i]) * WIDEN(x[i]);
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    float mean = sum * rstd / (float)width;
    for (count i = 0; i < width; i++) {
        float c = WIDEN(dy[i]) * WIDEN(weight[i]), n = WIDEN(x[i]) * rstd;
        dx[i] = NARROW(rstd * (c - n * mean));
    }
}

/* dx = rstd * (c - n * mean(c * n)) with c = weight * dy and n = x * rstd. */
void F(normalize_backward)(const T *dy, const T *x, const float *rstd, const T *weight, T *dx, count rows,
                           count width, count threads) {
#pragma omp parallel for num_threads(rows * width > FEW ? threads : 1)
    for (count row = 0; row < rows; row++)
        F(normalize_backward_row)(dy + row * width, x + row * width, weight, rstd[row], dx + row * width, width);
}

static inline void F(rotate_head)(const T *restrict x, T *restrict y, const T *restrict cos, const T *restrict first,
                                 const T *restrict second, count half, float direction) {
    for (count i = 0; i < half; i++) {
        float a = WIDEN(x[i]), b = WIDEN(x[half + i]);
        y[i] = NARROW(a * WIDEN(cos[i]) - direction * b * WIDEN(first[i]));
        y[half + i] = NARROW(b * WIDEN(cos[half + i]) + direction * a * WIDEN(second[i]));
    }
}

/* The heads of a token, of which the first `rotated` numbers are rotated; with direction -1 by the transpose, which
   takes the other half of sin along with the sign. */
static void F(rotate_heads)(const T *x, count x_head, T *y, count y_head, const T *cos, const T *sin, count heads,
                           count width, count rotated, float direction) {
    count half = rotated / 2;
    const T *first = direction > 0 ? sin : sin + half, *second = direction > 0 ? sin + half : sin;
    for (count head = 0; head < heads; head++) {
        F(rotate_head)(x + head * x_head, y + head * y_head, cos, first, second, half, direction);
        memcpy(y + head * y_head + rotated, x + head * x_head + rotated, (width - rotated) * sizeof(T));
    }
}

/* q, k and v out of the rows of qkv, q and k rotated. */
void F(split_and_rotate)(const T *qkv, const T *cos, const T *sin, T *q, T *k, T *v, count tokens, count heads,
                        count kv_heads, count width, count rotated, count threads) {
    count q_row = heads * width, kv_row = kv_heads * width, row = q_row + 2 * kv_row;
#pragma omp parallel for num_threads(tokens * row > FEW ? threads : 1)
    for (count t = 0; t < tokens; t++) {
        const T *from = qkv + t * row, *c = cos + t * rotated, *s = sin + t * rotated;
        F(rotate_heads)(from, width, q + t * q_row, width, c, s, heads, width, rotated, 1.0f);
        F(rotate_heads)(from + q_row, width, k + t * kv_row, width, c, s, kv_heads, width, rotated, 1.0f);
        memcpy(v + t * kv_row, from + q_row + kv_row, kv_row * sizeof(T));
    }
}

/* The gradient of qkv out of those of q, k and v, whose tokens and heads lie at strides of their own. */
void F(join_and_rotate_back)(const T *dq, const T *dk, const T *dv, const T *cos, const T *sin, T *d_qkv,
                            count q_token, count q_head, count k_token, count k_head, count v_token, count v_head,
                            count tokens, count heads, count kv_heads, count width, count rotated, count threads) {
    count q_row = heads * width, kv_row = kv_heads * width, row = q_row + 2 * kv_row;
#pragma omp parallel for num_threads(tokens * row > FEW ? threads : 1)
    for (count t = 0; t < tokens; t++) {
        T *to = d_qkv + t * row, *to_v = to + q_row + kv_row;
        const T *c = cos + t * rotated, *s = sin + t * rotated;
        F(rotate_heads)(dq + t * q_token, q_head, to, width, c, s, heads, width, rotated, -1.0f);
        F(rotate_heads)(dk + t * k_token, k_head, to + q_row, width, c, s, kv_heads, width, rotated, -1.0f);
        for (count head = 0; head < kv_heads; head++)
            memcpy(to_v + head * width, dv + t * v_token + head * v_head, width * sizeof(T));
    }
}

#endif
