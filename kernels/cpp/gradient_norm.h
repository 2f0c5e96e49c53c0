// The norm of all gradients: a sum for each chunk, in double, in an order that depends on nothing but its size, so that
// the bits are the same on every run and for any number of threads.

enum Kind { SUM, SQUARES, LARGEST };

static inline double read(const double *x) { return *x; }
static inline double read(const float *x) { return *x; }
struct Bfloat16 { uint16_t bits; };
static inline double read(const Bfloat16 *x) { return from_bfloat16(x->bits); }

// Elements as they are best read one by one.
template <class T> struct Place { const T *x; };
template <int N, class T> static inline Place<T> in_a_row(const T *x) { return {x}; }

static inline double combined(Kind kind, double a, double x) {
    if (kind == LARGEST) return a > x | a != a ? a : x;
    return a + (kind == SQUARES ? x * x : x);
}

// Bytes from what is summed to what is asked of memory. The processor itself looks ahead by less, and stops at a page.
static constexpr int AHEAD = 2048;

// first, chunks, gradients: as of `run`. sums: (chunks, 2) what is found, and how many elements are not finite.
template <Kind KIND, class T>
static void norms(int64_t works, const int64_t *first, const int64_t *chunks, const int64_t *gradients, double *sums,
                  int64_t threads) {
#pragma omp parallel for schedule(dynamic, taken_together(works, threads)) num_threads((int)threads) if (threads > 1)
    for (int64_t work = 0; work < works; ++work) {
        for (int64_t c = first[work]; c < first[work + 1]; ++c) {
            const T *x = (const T *)gradients[chunks[3 * c]] + chunks[3 * c + 1];
            const int64_t n = gradients[chunks[3 * c]] ? chunks[3 * c + 2] - chunks[3 * c + 1] : 0;
            constexpr int LANES = 32;
            double lane[LANES] = {}, faults = 0;
            int64_t i = 0;
            for (; i + LANES <= n; i += LANES) {
                for (int byte = 0; byte < LANES * (int)sizeof(T); byte += 64)
                    __builtin_prefetch((const char *)(x + i) + AHEAD + byte);
                const auto row = in_a_row<LANES>(x + i);
#pragma omp simd
                for (int j = 0; j < LANES; ++j) lane[j] = combined(KIND, lane[j], __builtin_fabs(read(row.x + j)));
            }
            for (; i < n; ++i) lane[i % LANES] = combined(KIND, lane[i % LANES], __builtin_fabs(read(x + i)));
            for (int half = LANES / 2; half; half /= 2)
                for (int j = 0; j < half; ++j)
                    lane[j] = KIND == LARGEST ? combined(LARGEST, lane[j], lane[j + half]) : lane[j] + lane[j + half];
            // What is not finite makes its sum so: else there is nothing to count.
            if (!(lane[0] < __builtin_inf()))
                for (i = 0; i < n; ++i) faults += __builtin_fabs(read(x + i)) < __builtin_inf() ? 0.0 : 1.0;
            sums[2 * c] = lane[0];
            sums[2 * c + 1] = faults;
        }
    }
}
