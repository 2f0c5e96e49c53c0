// The one loop of every rule on a CPU: chunks of any number of tensors, by as many threads as the caller says.
//
// Arithmetic is as written: nothing is contracted or reassociated, so that a result is that of the same operations in
// torch, NaN, Inf and denormals included.

// All of a block in one, by 16 lanes at first.
template <int N, class T, class F>
static inline T fold(const T *x, F combine) {
    alignas(64) T lane[16];
    for (int i = 0; i < 16; ++i) lane[i] = x[i];
    for (int start = 16; start < N; start += 16)
#pragma omp simd
        for (int i = 0; i < 16; ++i) lane[i] = combine(lane[i], x[start + i]);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] = combine(lane[i], lane[i + half]);
    return lane[0];
}

// A tensor of a role: bytes of an item, the elements it stands for, and whether incomplete blocks have all items.
struct Part {
    int64_t bytes, each;
    bool padded;
};

#define STEP_PARAMETERS                                                                                         \
    int64_t works, const int64_t *first, const int64_t *chunks, const int64_t *tensors, const int64_t *gradients, \
        const double *rows, const int32_t *keys, int64_t threads
#define STEP_ARGUMENTS works, first, chunks, tensors, gradients, rows, keys, threads

static constexpr int64_t WRAP = (int64_t)1 << 32;

// Update all chunks.
//
// first: (works + 1) the number of each thread's portion's first chunk; portions are taken one after the other.
// chunks: (chunks, 3) a tensor, and its elements from where to where; a chunk starts with a block.
// tensors: (tensors, COLUMNS) the number of elements, the row of scalars, the address of each part but the gradient.
// gradients: (tensors) addresses; 0 for none, and then nothing is done.
// rows: (rows, WIDTH) the factor of the gradient, the scalars of the rule, the weight in the average.
// keys: (tensors, 4) what the random bits depend on: the index of the first element, its lower and upper half; hashes.
template <int ROLES, int GRADIENT, int COLUMNS, int WIDTH, int SHARING, class Update>
static void run(const Part *about, Update update, STEP_PARAMETERS) {
    const auto portion = [&](int64_t work) {
        for (int64_t c = first[work]; c < first[work + 1]; ++c) {
            const int64_t *chunk = chunks + 3 * c, tensor = chunk[0];
            if (!gradients[tensor]) continue;
            const int64_t *entry = tensors + tensor * COLUMNS;
            const double *row = rows + entry[1] * WIDTH;
            const int32_t *key = keys + 4 * tensor;
            for (int64_t start = chunk[1], stop; start < chunk[2]; start = stop) {
                // An index of 32 bits, and another upper half where it wraps.
                const int64_t index = ((int64_t)key[1] << 32 | (uint32_t)key[0]) + start;
                stop = start + WRAP - index % WRAP < chunk[2] ? start + WRAP - index % WRAP : chunk[2];
                char *parts[ROLES];
                for (int i = 0; i < ROLES; ++i) {
                    const int64_t address = i == GRADIENT ? gradients[tensor] : entry[2 + i - (i > GRADIENT)];
                    parts[i] = (char *)address + start / about[i].each * about[i].bytes;
                }
                if (SHARING == 0) {
                    update(parts, row, key, (int32_t)index, (int32_t)(index >> 32), stop - start);
                    continue;
                }
                int64_t done = start;
                for (; done + SHARING <= stop; done += SHARING) {
                    const int64_t at = index + done - start;
                    update(parts, row, key, (int32_t)at, (int32_t)(at >> 32), SHARING);
                    for (int i = 0; i < ROLES; ++i) parts[i] += SHARING / about[i].each * about[i].bytes;
                }
                if (done < stop) {  // in memory of a whole block
                    alignas(64) char whole[ROLES][SHARING ? SHARING * 8 : 1] = {};
                    char *padded[ROLES];
                    for (int i = 0; i < ROLES; ++i) {
                        padded[i] = about[i].padded ? parts[i] : whole[i];
                        if (!about[i].padded) memcpy(whole[i], parts[i], (stop - done) * about[i].bytes);
                    }
                    const int64_t at = index + done - start;
                    update(padded, row, key, (int32_t)at, (int32_t)(at >> 32), stop - done);
                    for (int i = 0; i < ROLES; ++i)
                        if (!about[i].padded && i != GRADIENT) memcpy(parts[i], whole[i], (stop - done) * about[i].bytes);
                }
            }
        }
    };
    if (threads == 1) {  // and no other is woken
        for (int64_t work = 0; work < works; ++work) portion(work);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads((int)threads)
    for (int64_t work = 0; work < works; ++work) portion(work);
}
