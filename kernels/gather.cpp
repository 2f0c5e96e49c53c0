// The addresses of the gradients of many parameters, gathered in one call that makes no Python object of any: to ask
// for them one by one takes longer than all else that the host does in a step. Parameters and states are looked at, too:
// whether each lies where it did.
//
// Of a Python object, only words are read of which gather.py found out, in this process, what they hold.
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace {

using c10::TensorImpl;

// Where in an object is what, in bytes.
struct Words {
    int64_t type;    // in a Python object: its class
    int64_t tensor;  // in a tensor's Python object: the tensor itself
    int64_t object;  // in a tensor: its Python object
    int64_t local;   // in a DTensor's Python object: its local part's
    int64_t spec;    // in a DTensor's Python object: how it is sharded
};

char *word(const void *object, int64_t place) {
    return *reinterpret_cast<char *const *>(static_cast<const char *>(object) + place);
}

// A parameter or state as it was when it was noted.
struct Known {
    const char *object;
    const char *spec;  // of a DTensor's gradient; null for an ordinary tensor; of a sharded state not null
    const void *data;
    c10::DispatchKeySet keys;
    caffe2::TypeMeta dtype;
    size_t rank, dims;  // its sizes and then its strides start there
};

struct Bucket {
    Words words;
    const char *plain_type;  // torch.Tensor
    caffe2::TypeMeta gradient;
    std::vector<Known> known, states;
    std::vector<int64_t> dims;
    bool watched = true;  // whether all states can be looked at
};

// The keys that say how a tensor is kept, and not whether autograd follows it.
c10::DispatchKeySet kept(c10::DispatchKeySet keys) { return keys - c10::autograd_dispatch_keyset_with_ADInplaceOrView; }

TensorImpl *tensor_of(const Words &words, const void *object) {
    return reinterpret_cast<TensorImpl *>(word(object, words.tensor));
}

// The tensor of a parameter's object, or of its local part, null where that is not an ordinary tensor.
TensorImpl *values_of(const Bucket &bucket, const char *object, bool sharded) {
    if (sharded) {
        object = word(object, bucket.words.local);
        if (object == nullptr || word(object, bucket.words.type) != bucket.plain_type) return nullptr;
    }
    return tensor_of(bucket.words, object);
}

// A tensor's Python object. The pointer's lowest bit is a flag in some releases of torch.
const char *object_of(const Words &words, const TensorImpl *tensor) {
    return reinterpret_cast<const char *>(reinterpret_cast<uintptr_t>(word(tensor, words.object)) & ~uintptr_t(1));
}

// Takes note of a tensor. False where it is of a kind that Python must look at.
bool take(Bucket &bucket, std::vector<Known> &list, const char *object, const char *spec) {
    TensorImpl *t = values_of(bucket, object, spec != nullptr);
    if (t == nullptr || t->is_inference() || t->is_python_dispatch() || t->layout() != c10::kStrided) return false;
    const size_t rank = t->dim(), dims = bucket.dims.size();
    const void *data = t->mutable_data();
    if (data == nullptr && t->numel() != 0) return false;
    list.push_back({object, spec, data, t->key_set(), t->dtype(), rank, dims});
    bucket.dims.insert(bucket.dims.end(), t->sizes().begin(), t->sizes().end());
    bucket.dims.insert(bucket.dims.end(), t->strides().begin(), t->strides().end());
    return true;
}

// A parameter's values and its gradient, of sharded ones the local parts; null where Python must look.
struct Pair {
    TensorImpl *p, *g;
    bool missing;  // there is no gradient
};

constexpr int64_t BATCH = 16;

void ask_for(const void *place, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char *>(place) + i);
}

// Each place tells where the next one lies, and after a backward pass none is in a cache. For the places of one tensor
// after the other the processor would wait again and again: it is asked for those of a batch side by side.
void find(const Bucket &bucket, const Known *known, int64_t n, Pair *pairs) {
    const Words &words = bucket.words;
    const auto ask_for_tensor = [](const TensorImpl *t) { ask_for(t, sizeof(TensorImpl)); };
    const auto ask_for_storage = [](const TensorImpl *t) {
        if (t != nullptr) ask_for(t->unsafe_storage().unsafeGetStorageImpl(), 64);
    };
    const char *objects[BATCH];
    for (int64_t i = 0; i < n; ++i) ask_for(known[i].object, 128);
    for (int64_t i = 0; i < n; ++i) {
        ask_for_tensor(tensor_of(words, known[i].object));
        if (known[i].spec != nullptr) ask_for(word(known[i].object, words.local), 64);
    }
    for (int64_t i = 0; i < n; ++i) {
        ask_for_tensor(pairs[i].p = values_of(bucket, known[i].object, known[i].spec != nullptr));
        ask_for(tensor_of(words, known[i].object)->autograd_meta(), 128);
    }
    for (int64_t i = 0; i < n; ++i) {
        const at::Tensor &gradient = tensor_of(words, known[i].object)->grad();
        pairs[i].missing = !gradient.defined();
        pairs[i].g = pairs[i].missing ? nullptr : gradient.unsafeGetTensorImpl();
        ask_for_tensor(pairs[i].g);
        ask_for_storage(pairs[i].p);
    }
    const auto sharded = [&](int64_t i) { return known[i].spec != nullptr && pairs[i].g != nullptr; };
    for (int64_t i = 0; i < n; ++i)
        if (sharded(i)) ask_for(objects[i] = object_of(words, pairs[i].g), 128);
    for (int64_t i = 0; i < n; ++i)
        if (sharded(i)) {
            const auto is_a = [&](const char *object) { return word(object, words.type); };
            const bool alike = objects[i] != nullptr && is_a(objects[i]) == is_a(known[i].object);
            if (alike && word(objects[i], words.spec) == known[i].spec)
                ask_for(word(objects[i], words.local), 64);
            else
                pairs[i].g = nullptr;
        }
    for (int64_t i = 0; i < n; ++i)
        if (sharded(i)) ask_for_tensor(pairs[i].g = values_of(bucket, objects[i], true));
    for (int64_t i = 0; i < n; ++i) ask_for_storage(pairs[i].g);
}

bool as_known(const Bucket &bucket, const Known &known, const TensorImpl *p) {
    const int64_t *sizes = bucket.dims.data() + known.dims, *strides = sizes + known.rank;
    return p->key_set() == known.keys && p->dtype() == known.dtype && p->sizes().equals({sizes, known.rank}) &&
           p->strides().equals({strides, known.rank});
}

// Whether these tensors are what they were, and lie where they did.
bool are_as_known(const Bucket &bucket, const std::vector<Known> &list) {
    const int64_t count = list.size();
    for (int64_t start = 0; start < count; start += BATCH) {
        const Known *known = list.data() + start;
        const int64_t n = std::min(BATCH, count - start);
        TensorImpl *tensors[BATCH];
        for (int64_t i = 0; i < n; ++i) ask_for(known[i].object, 64);
        for (int64_t i = 0; i < n; ++i) {
            tensors[i] = values_of(bucket, known[i].object, known[i].spec != nullptr);
            ask_for(tensors[i], sizeof(TensorImpl));
        }
        for (int64_t i = 0; i < n; ++i) {
            if (tensors[i] == nullptr) return false;
            ask_for(tensors[i]->unsafe_storage().unsafeGetStorageImpl(), 64);
        }
        for (int64_t i = 0; i < n; ++i)
            if (!as_known(bucket, known[i], tensors[i]) || tensors[i]->data() != known[i].data) return false;
    }
    return true;
}

// Whether the elements of a gradient lie as the parameter's.
bool alike(const TensorImpl *p, const TensorImpl *g) {
    if (p->sizes() != g->sizes() || kept(p->key_set()) != kept(g->key_set())) return false;
    const auto sizes = p->sizes(), ours = p->strides(), theirs = g->strides();
    for (size_t i = 0; i < sizes.size(); ++i)
        if (sizes[i] != 1 && ours[i] != theirs[i]) return false;
    return true;
}

}  // namespace

extern "C" {

// Of Python's stable interface, so that its headers need not be installed.
ssize_t PyList_Size(PyObject *);
PyObject *PyList_GetItem(PyObject *, ssize_t);

// Notes parameters. `specs` has a null for each that is an ordinary tensor; `like` is a tensor of the gradients' dtype.
// Null where one of them is of a kind that Python must look at.
void *note(const Words *words, int64_t n, const char *const *objects, const char *const *specs, const void *like) try {
    auto bucket = std::make_unique<Bucket>();
    bucket->words = *words;
    bucket->plain_type = word(like, words->type);
    bucket->gradient = tensor_of(*words, like)->dtype();
    for (int64_t i = 0; i < n; ++i) {
        if (!take(*bucket, bucket->known, objects[i], specs[i])) return nullptr;
    }
    return bucket.release();
} catch (...) {
    return nullptr;
}

// Notes the states of the parameters, in place of those that were noted before.
void watch(void *of, int64_t n, const char *const *objects, const char *const *sharded) try {
    Bucket &bucket = *static_cast<Bucket *>(of);
    bucket.watched = false;
    if (!bucket.states.empty()) bucket.dims.resize(bucket.states.front().dims);
    bucket.states.clear();
    for (int64_t i = 0; i < n; ++i)
        if (!take(bucket, bucket.states, objects[i], sharded[i])) return;
    bucket.watched = true;
} catch (...) {
}

void forget(void *bucket) { delete static_cast<Bucket *>(bucket); }

// Fills in where the gradients lie, 0 for none. Negative where Python must look: a parameter or state is not what it was,
// or a gradient is not kept as its parameter, or has no memory. Else the sum of 1, if all addresses are multiples of 16,
// and 2, if none is 0.
int gather(const void *of, int64_t *addresses) try {
    const Bucket &bucket = *static_cast<const Bucket *>(of);
    if (!bucket.watched || !are_as_known(bucket, bucket.states)) return -1;
    int64_t all = 0;
    bool complete = true;
    const int64_t count = bucket.known.size();
    for (int64_t start = 0; start < count; start += BATCH) {
        const Known *known = bucket.known.data() + start;
        const int64_t n = std::min(BATCH, count - start);
        Pair pairs[BATCH];
        find(bucket, known, n, pairs);
        for (int64_t i = 0; i < n; ++i) {
            const auto [p, g, missing] = pairs[i];
            if (p == nullptr || !as_known(bucket, known[i], p) || p->mutable_data() != known[i].data) return -1;
            int64_t address = 0;
            if (!missing) {
                if (g == nullptr || g->dtype() != bucket.gradient || !alike(p, g)) return -1;
                address = reinterpret_cast<int64_t>(g->data());
                if (address == 0) return -1;
            }
            *addresses++ = address;
            all |= address;
            complete &= !missing;
        }
    }
    return (all % 16 == 0) + 2 * complete;
} catch (...) {
    return -1;
}

int64_t tensor_size() { return sizeof(TensorImpl); }

// Whether a list of Python's holds these objects. None of them is read: a thousand may lie outside of all caches.
bool holds(PyObject *list, int64_t n, const PyObject *const *objects) {
    if (PyList_Size(list) != n) return false;
    for (int64_t i = 0; i < n; ++i)
        if (PyList_GetItem(list, i) != objects[i]) return false;
    return true;
}

// Whether none of these parameters has a gradient.
bool without(const Words *words, int64_t n, const char *const *objects) {
    for (int64_t i = 0; i < n; ++i)
        if (tensor_of(*words, objects[i])->grad().defined()) return false;
    return true;
}

// Tells autograd that the parameters that have gradients were written.
void written(const void *of) {
    const Bucket &bucket = *static_cast<const Bucket *>(of);
    for (const Known &known : bucket.known)
        if (tensor_of(bucket.words, known.object)->grad().defined())
            values_of(bucket, known.object, known.spec != nullptr)->bump_version();
}
}
