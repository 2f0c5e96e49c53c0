// How chunks are shared out among threads.

// Portions that a thread takes at a time: those that follow each other are read faster than those between another
// thread's. Each thread takes eight times or more, so that none waits long for another.
static inline int taken_together(int64_t works, int64_t threads) {
    const int64_t most = works / (8 * threads);
    return most < 1 ? 1 : most > 16 ? 16 : (int)most;
}
