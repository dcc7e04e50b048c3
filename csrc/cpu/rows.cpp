// The row passes between the GEMMs of a language-model head, for fp32 logits on a CPU.
//
// fastpref_score_rows: m = max_v z[v], e[v] = exp(z[v] - m), S = sum_v e[v], y the row's label,
//     logp = z[y] - m - log S      lse = m + log S      entropy = log S - sum_v e[v] (z[v] - m) / S
// and, with a scale, in place      z[v] <- scale * ([v == y] - e[v] / S).
// fastpref_delta_rows: the same for a panel of the vocabulary and rows whose lse is known,
//     z[v] <- scale * ([v == y] - exp(z[v] - lse)).
//
// A row is read from memory once; later passes over it hit the cache. One thread computes a whole
// row, in the same order whichever outputs are requested, so results depend on the row alone. NaN
// in a row makes its results NaN; -inf is a vocabulary entry of probability zero. Both need a
// compiler that keeps IEEE comparisons (no -ffast-math); contraction to fused multiply-add is fine.

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int WIDTH = 16;        // an AVX-512 register; compilers split it for narrower machines
constexpr int64_t BLOCK = 2048;  // fp32 sums have BLOCK / WIDTH / 2 terms, sums of those are fp64
constexpr float SMALLEST = -87.0f;  // below it exp is less than the smallest normal number: 0

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));

struct Statistics {
  float logp, lse, entropy;
  bool top1;
};

INLINE Floats fill(float x) { return x - Floats{}; }

INLINE Floats load(const float* p, int64_t n) {
  Floats x = fill(-INFINITY);
  if (n == WIDTH)
    std::memcpy(&x, p, sizeof x);
  else
    std::memcpy(&x, p, n * sizeof(float));
  return x;
}

INLINE void store(float* p, int64_t n, const Floats& x) {
  if (n == WIDTH)
    std::memcpy(p, &x, sizeof x);
  else
    std::memcpy(p, &x, n * sizeof(float));
}

// Call f(k, v, n) for each vector of n floats at v = start, start + WIDTH .. stop; k is 0, 1, 0, ..
template <class Function>
INLINE void each_vector(int64_t start, int64_t stop, Function f) {
  int64_t v = start;
  for (; v + 2 * WIDTH <= stop; v += 2 * WIDTH) {
    f(0, v, WIDTH);
    f(1, v + WIDTH, WIDTH);
  }
  for (; v < stop; v += WIDTH) f(0, v, stop - v < WIDTH ? stop - v : WIDTH);
}

// exp(x) = 2^n exp(r) with |r| <= ln(2) / 2: ln 2 is subtracted in two parts, the polynomial is a
// Chebyshev fit (relative error 8e-9). Good to 2 ulp; larger x are clamped to 88. The last product,
// unlike an addition to the exponent's bits, keeps NaN.
INLINE Floats exponential(Floats x) {
  const Floats magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = x > 88.0f ? fill(88.0f) : x;
  const Floats shifted = x * 1.44269504f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.39261836e-3f + 8.36317905e-3f;
  p = p * r + 4.16665546e-2f;
  p = p * r + 1.66665770e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  const Floats power = (Floats)(((Ints)shifted << 23) + 0x3f800000);
  return x < SMALLEST ? Floats{} : p * power;
}

INLINE double sum(const Floats& x) {
  double total = 0;
  for (int k = 0; k < WIDTH; k++) total += x[k];
  return total;
}

// Largest element of a row; NaN is skipped.
INLINE float largest(const float* z, int64_t columns) {
  Floats best[2] = {fill(-INFINITY), fill(-INFINITY)};
  each_vector(0, columns, [&](int k, int64_t v, int64_t n) __attribute__((always_inline)) {
    const Floats x = load(z + v, n);
    best[k] = x > best[k] ? x : best[k];
  });
  best[0] = best[0] > best[1] ? best[0] : best[1];
  float result = -INFINITY;
  for (int k = 0; k < WIDTH; k++) result = best[0][k] > result ? best[0][k] : result;
  return result;
}

struct Sums {
  double e, products;  // sums of e[v] and of e[v] (z[v] - m)
};

template <bool WITH_ENTROPY, bool KEEP>
INLINE Sums exponentiate(float* z, int64_t columns, float m) {
  Sums sums = {0, 0};
  for (int64_t start = 0; start < columns; start += BLOCK) {
    const int64_t stop = columns - start < BLOCK ? columns : start + BLOCK;
    Floats e[2] = {}, products[2] = {};
    each_vector(start, stop, [&](int k, int64_t v, int64_t n) __attribute__((always_inline)) {
      const Floats shifted = load(z + v, n) - m, term = exponential(shifted);
      e[k] += term;
      // Where e[v] is 0, z[v] - m may be -inf and their product NaN.
      if (WITH_ENTROPY) products[k] += term * (shifted < SMALLEST ? fill(SMALLEST) : shifted);
      if (KEEP) store(z + v, n, term);
    });
    sums.e += sum(e[0] + e[1]);
    if (WITH_ENTROPY) sums.products += sum(products[0] + products[1]);
  }
  return sums;
}

INLINE void score(float* z, int64_t columns, int64_t label, bool entropy, const float* scale,
                  Statistics* out) {
  const float m = largest(z, columns), target = z[label];
  const Sums sums = entropy ? scale ? exponentiate<true, true>(z, columns, m)
                                   : exponentiate<true, false>(z, columns, m)
                            : scale ? exponentiate<false, true>(z, columns, m)
                                   : exponentiate<false, false>(z, columns, m);
  const double log_sum = std::log(sums.e);
  out->logp = float((double(target) - m) - log_sum);
  out->lse = float(m + log_sum);
  out->entropy = entropy ? float(log_sum - sums.products / sums.e) : 0.0f;
  out->top1 = target >= m && sums.e == sums.e;
  if (!scale) return;
  const float row_scale = float(-*scale / sums.e);
  each_vector(0, columns, [&](int, int64_t v, int64_t n) __attribute__((always_inline)) {
    store(z + v, n, load(z + v, n) * row_scale);
  });
  z[label] += *scale;
}

INLINE void dlogits(float* z, int64_t columns, int64_t label, float lse, float scale) {
  each_vector(0, columns, [&](int, int64_t v, int64_t n) __attribute__((always_inline)) {
    store(z + v, n, exponential(load(z + v, n) - lse) * -scale);
  });
  if (0 <= label && label < columns) z[label] += scale;
}

// One copy of the two row functions for each instruction set; the call selects one.
#define VARIANT(name, target)                                                                     \
  target void score_##name(float* z, int64_t columns, int64_t label, bool entropy,                \
                           const float* scale, Statistics* out) {                                 \
    score(z, columns, label, entropy, scale, out);                                                \
  }                                                                                               \
  target void dlogits_##name(float* z, int64_t columns, int64_t label, float lse, float scale) {  \
    dlogits(z, columns, label, lse, scale);                                                       \
  }

VARIANT(plain, )
#if defined(__x86_64__)
VARIANT(avx2, __attribute__((target("avx2,fma"))))
VARIANT(avx512, __attribute__((target("avx512f"))))
#define CHOOSE(function)                                            \
  (__builtin_cpu_supports("avx512f") ? function##_avx512            \
   : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") \
       ? function##_avx2                                            \
       : function##_plain)
#else
#define CHOOSE(function) function##_plain
#endif

}  // namespace

extern "C" {

// Version of the signatures below; callers compare it with theirs.
int fastpref_rows_version() { return 1; }

// z: rows x columns, `stride` floats from row to row. scale null: z is left as it is; entropy null:
// not computed. Returns the number of labels outside 0 .. columns - 1; their rows stay unchanged.
int64_t fastpref_score_rows(float* z, int64_t rows, int64_t columns, int64_t stride,
                            const int64_t* labels, const float* scale, float* logps, float* lse,
                            float* entropy, bool* top1, int threads) {
  const auto score_row = CHOOSE(score);
  int64_t out_of_range = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : out_of_range)
  for (int64_t t = 0; t < rows; t++) {
    if (labels[t] < 0 || labels[t] >= columns) {
      out_of_range++;
      continue;
    }
    Statistics out;
    score_row(z + t * stride, columns, labels[t], entropy != nullptr, scale, &out);
    logps[t] = out.logp;
    lse[t] = out.lse;
    top1[t] = out.top1;
    if (entropy) entropy[t] = out.entropy;
  }
  return out_of_range;
}

// labels: relative to the panel; a label outside it has no column here. lse, scale: one per row.
void fastpref_delta_rows(float* z, int64_t rows, int64_t columns, int64_t stride,
                         const int64_t* labels, const float* lse, const float* scale, int threads) {
  const auto dlogits_row = CHOOSE(dlogits);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < rows; t++)
    dlogits_row(z + t * stride, columns, labels[t], lse[t], scale[t]);
}

}  // extern "C"
