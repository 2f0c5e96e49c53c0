// The one loop of every rule on a CPU: chunks of any number of tensors, by as many threads as the caller says.
//
// Arithmetic is as written: nothing is contracted or reassociated, so that a result is that of the same operations in
// torch, NaN, Inf and denormals included.

// The largest of a block's absolute values, NaN if there is one: as integers they have the same order, NaN last.
template <int N>
static inline float absmax(const float *x) {
    int32_t found = 0;
#pragma omp simd reduction(max : found)
    for (int i = 0; i < N; ++i) {
        const int32_t size = __builtin_bit_cast(int32_t, x[i]) & 0x7FFFFFFF;
        found = size > found ? size : found;
    }
    return __builtin_bit_cast(float, found);
}

// A tensor of a role: bytes of an item, the elements it stands for, and whether incomplete blocks have all items.
struct Part {
    int64_t bytes, each;
    bool padded;
};

// The sum of elements, in double, in an order that depends on nothing but their number.
template <class T>
static inline double sum_of(const T *x, int64_t n) {
    constexpr int LANES = 16;
    double lane[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
#pragma omp simd
        for (int j = 0; j < LANES; ++j) lane[j] += x[i + j];
    }
    for (; i < n; ++i) lane[i % LANES] += x[i];
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    return lane[0];
}

// What is called for the elements of a block; of a measure `sums` is (chunks, sums), which it adds to.
#define UPDATE_PARAMETERS                                                                                       \
    char *const *parts, const double *row, const int32_t *key, int32_t low, int32_t high, int64_t n, bool asks, \
        int64_t chunk, double *sums

// Elements from those at work to those asked of memory, where a chunk is LONG and portions are MANY: the processor itself
// looks ahead by less, and stops at a page. What is smaller may well be in a cache.
static constexpr int64_t AHEAD = 512, LONG = 4096, MANY = 32;

// Ask for so many bytes, to read them, or to write them, too.
template <int BYTES> static inline void ask(const void *part) {
    for (int i = 0; i < BYTES; i += 64) __builtin_prefetch((const char *)part + i, 0);
}
template <int BYTES> static inline void ask(void *part) {
    for (int i = 0; i < BYTES; i += 64) __builtin_prefetch((const char *)part + i, 1);
}

// What a step is given, in 64 bits each: see backends/cpp/bucket.py.
struct Step {
    int64_t works;  // portions, taken one after the other
    const int64_t *first, *chunks, *tensors, *gradients;
    const double *rows;
    const int32_t *keys;
    double *sums;
    int64_t threads;
};

static constexpr int64_t WRAP = (int64_t)1 << 32;

// Update all chunks.
//
// first: (works + 1) the number of each portion's first chunk.
// chunks: (chunks, 3) a tensor, and its elements from where to where; a chunk starts with a block.
// tensors: (tensors, COLUMNS) the number of elements, the row of scalars, the address of each part but the gradient.
// gradients: (tensors) addresses; 0 for none, and then nothing is done.
// rows: (rows, WIDTH) the factor of the gradient, the scalars of the rule, the weight in the average.
// keys: (tensors, 4) what the random bits depend on: the index of the first element, its lower and upper half; hashes.
// BATCH: elements that `update` is given at a time. BLOCK: they are whole blocks of so many, or less than one in memory
// of a whole one; 0 for any number.
template <const Part *ABOUT, int PARTS, int GRADIENT, int WIDTH, int BATCH, int BLOCK, class Update>
static void run(Update update, const Step *step) {
    const int64_t works = step->works, threads = step->threads;
    const int64_t *const first = step->first, *const chunks = step->chunks, *const tensors = step->tensors;
    const int64_t *const gradients = step->gradients;
    const double *const rows = step->rows;
    const int32_t *const keys = step->keys;
    double *const sums = step->sums;
    const auto portion = [&](int64_t work) __attribute__((noinline)) {
        for (int64_t c = first[work]; c < first[work + 1]; ++c) {
            const int64_t *chunk = chunks + 3 * c, tensor = chunk[0];
            if (!gradients[tensor]) continue;
            const int64_t *entry = tensors + tensor * (1 + PARTS);
            const double *row = rows + entry[1] * WIDTH;
            const int32_t *key = keys + 4 * tensor;
            const int64_t index = (int64_t)key[1] << 32 | (uint32_t)key[0];
            const bool asks = works >= MANY && chunk[2] - chunk[1] >= LONG;
            char *parts[PARTS];
            for (int i = 0; i < PARTS; ++i) {
                const int64_t address = i == GRADIENT ? gradients[tensor] : entry[2 + i - (i > GRADIENT)];
                parts[i] = (char *)address + chunk[1] / ABOUT[i].each * ABOUT[i].bytes;
            }
            for (int64_t start = chunk[1], n; start < chunk[2]; start += n) {
                // An index of 32 bits is enough, as nothing goes on where it wraps.
                const int64_t here = index + start;
                n = chunk[2] - start < BATCH ? chunk[2] - start : BATCH;
                if ((uint32_t)here + n > WRAP) n = WRAP - (uint32_t)here;
                if (BLOCK && n > BLOCK) n -= n % (BLOCK + !BLOCK);
                alignas(64) char memory[BLOCK ? PARTS : 1][BLOCK ? BLOCK * 8 : 1];
                char *own[PARTS];
                for (int i = 0; i < PARTS; ++i) {
                    own[i] = parts[i];
                    if (BLOCK && n < BLOCK && !ABOUT[i].padded) {
                        memset(memory[i], 0, BLOCK * ABOUT[i].bytes);
                        memcpy(own[i] = memory[i], parts[i], n * ABOUT[i].bytes);
                    }
                }
                update(own, row, key, (int32_t)here, (int32_t)(here >> 32), n, asks, c, sums);
                for (int i = 0; i < PARTS; ++i) {
                    if (own[i] != parts[i] && i != GRADIENT) memcpy(parts[i], own[i], n * ABOUT[i].bytes);
                    parts[i] += n / ABOUT[i].each * ABOUT[i].bytes;
                }
            }
        }
    };
    if (threads == 1) {  // and no other is woken
        for (int64_t work = 0; work < works; ++work) portion(work);
        return;
    }
#pragma omp parallel for schedule(dynamic, taken_together(works, threads)) num_threads((int)threads)
    for (int64_t work = 0; work < works; ++work) portion(work);
}
