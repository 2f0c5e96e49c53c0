// The addresses of the gradients of many parameters, gathered in one call that makes no Python object of any: to ask
// for them one by one takes longer than all else that the host does in a step. Parameters and states are looked at, too:
// whether each lies where it did.
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>
#include <vector>

extern "C" {

// Of Python's stable interface, so that its headers need not be installed.
extern char PyList_Type;  // of which only the address is taken
void Py_DecRef(PyObject *);
ssize_t PyList_Size(PyObject *);
PyObject *PyList_GetItem(PyObject *, ssize_t);
PyObject *PyDict_GetItem(PyObject *, PyObject *);
int PyDict_Next(PyObject *, ssize_t *, PyObject **, PyObject **);
PyObject *PyObject_Type(PyObject *);
}

namespace {

using c10::TensorImpl;

// What gather.py knows of Python's objects: where in a DTensor what it holds is, in bytes, and the classes.
struct Places {
    int64_t local, spec;
    const PyObject *plain, *sharded;
};

int64_t tensor_place = 0;  // where in a tensor's object the tensor is

// For so few numbers a call takes longer than a loop.
bool same(c10::IntArrayRef a, c10::IntArrayRef b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); ++i)
        if (a[i] != b[i]) return false;
    return true;
}

// How a tensor is kept.
struct Kind {
    c10::DispatchKeySet keys;
    caffe2::TypeMeta dtype;
    bool contiguous;
    std::vector<int64_t> sizes, strides;

    // To read the strides, too, would be to wait for one more line of memory.
    bool is_of(const TensorImpl *t) const {
        return t->key_set() == keys && t->dtype() == dtype && same(t->sizes(), sizes) &&
               (contiguous ? t->is_contiguous() : same(t->strides(), strides));
    }
};

// A parameter's values or a state as they were when they were noted.
struct Known {
    PyObject *object;    // of an ordinary tensor, or of a DTensor's local part
    TensorImpl *tensor;  // of `object`
    c10::StorageImpl *storage;
    const void *memory;  // that the storage has
    int64_t offset;      // where in it the tensor begins, in elements
    size_t kind;
};

struct Tensors {
    std::vector<Known> known;
    std::vector<PyObject *> sharded;  // the DTensor of each, null for an ordinary tensor; empty where all are ordinary
};

// What has a gradient: a parameter.
struct Owner {
    PyObject *object;
    TensorImpl *tensor;
    const c10::AutogradMetaInterface *meta;  // what autograd keeps of it
    const at::Tensor *gradient;              // a part of `meta`
};

// On the way to where a gradient lies.
struct Gradient {
    TensorImpl *tensor;  // null for none; in the end a sharded one's local part
    PyObject *object;    // of a sharded one
};

struct Bucket {
    Places places;
    caffe2::TypeMeta dtype;  // of the gradients
    Tensors values, states;
    std::vector<Owner> owners;
    std::vector<PyObject *> specs;  // how the gradient of each is sharded, null for an ordinary one
    std::vector<Kind> kinds;
    std::vector<Gradient> gradients;  // in a call
    bool sharded = false;             // whether there are sharded parameters
    bool watched = true;              // whether all states can be looked at
};

// The keys that say how a tensor is kept, and not whether autograd follows it.
c10::DispatchKeySet kept(c10::DispatchKeySet keys) { return keys - c10::autograd_dispatch_keyset_with_ADInplaceOrView; }

template <class T>
T *at(const PyObject *object, int64_t place) {
    return *reinterpret_cast<T *const *>(reinterpret_cast<const char *>(object) + place);
}

TensorImpl *tensor_of(const PyObject *object) { return at<TensorImpl>(object, tensor_place); }

c10::StorageImpl *storage_of(const TensorImpl *t) { return t->unsafe_storage().unsafeGetStorageImpl(); }

// A tensor's Python object, null for none.
template <class Slot>
PyObject *object_in(const Slot &slot) {
    if constexpr (requires { slot.load_pyobj(); })
        return slot.load_pyobj();
    else
        return slot._unchecked_untagged_pyobj();  // before torch 2.12
}

bool is_a(const PyObject *type, PyObject *object) {
    PyObject *own = PyObject_Type(object);
    Py_DecRef(own);
    return own == type;
}

// Takes note of a tensor. False where it is of a kind that Python must look at.
bool take(Bucket &bucket, Tensors &tensors, PyObject *object, bool sharded) {
    if (sharded) {
        tensors.sharded.resize(tensors.known.size());
        tensors.sharded.push_back(object);
        if (!is_a(bucket.places.sharded, object)) return false;
        object = at<PyObject>(object, bucket.places.local);
        if (object == nullptr || !is_a(bucket.places.plain, object)) return false;
    } else if (!tensors.sharded.empty()) {
        tensors.sharded.push_back(nullptr);
    }
    TensorImpl *t = tensor_of(object);
    if (t->is_inference() || t->is_python_dispatch() || t->layout() != c10::kStrided) return false;
    if (t->mutable_data() == nullptr && t->numel() != 0) return false;
    c10::StorageImpl *storage = storage_of(t);
    std::vector<Kind> &kinds = bucket.kinds;
    size_t kind = tensors.known.empty() ? 0 : tensors.known.back().kind;
    if (kind >= kinds.size() || !kinds[kind].is_of(t))
        for (kind = 0; kind < kinds.size() && !kinds[kind].is_of(t);) ++kind;
    if (kind == kinds.size()) kinds.push_back({t->key_set(), t->dtype(), t->is_contiguous(), t->sizes().vec(), t->strides().vec()});
    tensors.known.push_back({object, t, storage, storage->mutable_data(), t->storage_offset(), kind});
    return true;
}

// After a backward pass none of what is read is in a cache. While one tensor is looked at, the processor is asked for
// what the next ones will need, so that it waits for many places at once, not for one after the other. Where something
// was replaced, it is asked for what nobody reads.
constexpr int64_t AHEAD = 8;

void ask_for(const void *object, int64_t start, int64_t end) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(object) + start, last = first + (end - start) - 1;
    for (uintptr_t line = first / 64; line <= last / 64; ++line)
        __builtin_prefetch(reinterpret_cast<const void *>(line * 64));
}

// Of each only the lines that are read: of a tensor those of its storage and sizes, and then of its dtype and keys.
// Where torch keeps them otherwise, this asks for others, and that is all.
void ask_for_object(const PyObject *object) { ask_for(object, 8, 24); }
void ask_for_sharded(const PyObject *object) { ask_for(object, 0, 128); }
void ask_for_storage(const void *storage) { ask_for(storage, 16, 24); }
void ask_for_tensor(const TensorImpl *t) {
    ask_for(t, 16, 80);
    ask_for(t, sizeof(TensorImpl) - 32, sizeof(TensorImpl));
}

void ask_for_known(const Tensors &tensors, int64_t i) {
    const Known &known = tensors.known[i];
    ask_for_object(known.object);
    ask_for_tensor(known.tensor);
    ask_for_storage(known.storage);
    if (!tensors.sharded.empty()) ask_for_sharded(tensors.sharded[i]);
}

// Whether a tensor is what it was, and lies where it did.
bool as_known(const Bucket &bucket, const Tensors &tensors, int64_t i) {
    const Known &known = tensors.known[i];
    if (!tensors.sharded.empty() && tensors.sharded[i] != nullptr &&
        at<PyObject>(tensors.sharded[i], bucket.places.local) != known.object)
        return false;
    const TensorImpl *t = known.tensor;
    // Of memory that is shared until it is written, the storage makes its own copy here, which lies elsewhere.
    return tensor_of(known.object) == t && storage_of(t) == known.storage && t->storage_offset() == known.offset &&
           known.storage->mutable_data() == known.memory && bucket.kinds[known.kind].is_of(t);
}

bool states_as_known(const Bucket &bucket) {
    const int64_t count = bucket.states.known.size();
    for (int64_t i = 0; i < count; ++i) {
        if (i + AHEAD < count) ask_for_known(bucket.states, i + AHEAD);
        if (!as_known(bucket, bucket.states, i)) return false;
    }
    return true;
}

// The stages of finding a gradient. False where Python must look.

bool find_gradient(const Owner &owner, Gradient &gradient) {
    if (tensor_of(owner.object) != owner.tensor || owner.tensor->autograd_meta() != owner.meta) return false;
    gradient.tensor = owner.gradient->defined() ? owner.gradient->unsafeGetTensorImpl() : nullptr;
    ask_for_tensor(gradient.tensor);
    return true;
}

bool find_object(const PyObject *spec, Gradient &gradient) {
    if (spec == nullptr || gradient.tensor == nullptr) return true;
    gradient.object = gradient.tensor->is_python_dispatch() ? object_in(*gradient.tensor->pyobj_slot()) : nullptr;
    ask_for_sharded(gradient.object);
    return gradient.object != nullptr;
}

bool find_local(const Places &places, const PyObject *spec, Gradient &gradient) {
    if (spec == nullptr || gradient.tensor == nullptr) return true;
    if (!is_a(places.sharded, gradient.object) || at<PyObject>(gradient.object, places.spec) != spec) return false;
    gradient.object = at<PyObject>(gradient.object, places.local);
    ask_for_object(gradient.object);
    return gradient.object != nullptr;
}

bool find_values(const Places &places, const PyObject *spec, Gradient &gradient) {
    if (spec == nullptr || gradient.tensor == nullptr) return true;
    if (!is_a(places.plain, gradient.object)) return false;
    gradient.tensor = tensor_of(gradient.object);
    ask_for_tensor(gradient.tensor);
    return true;
}

// Whether the elements of a gradient lie as the parameter's.
bool alike(const TensorImpl *p, const TensorImpl *g) {
    if (!same(p->sizes(), g->sizes()) || kept(p->key_set()) != kept(g->key_set())) return false;
    if (p->is_contiguous() && g->is_contiguous()) return true;
    const auto sizes = p->sizes(), ours = p->strides(), theirs = g->strides();
    for (size_t i = 0; i < sizes.size(); ++i)
        if (sizes[i] != 1 && ours[i] != theirs[i]) return false;
    return true;
}

}  // namespace

extern "C" {

void begin(int64_t place) { tensor_place = place; }

// Notes parameters. `specs` has a null for each that is an ordinary tensor; `like` is a tensor of the gradients' dtype.
// Null where one of them is of a kind that Python must look at.
void *note(const Places *places, int64_t n, PyObject *const *objects, PyObject *const *specs, const PyObject *like) try {
    auto bucket = std::make_unique<Bucket>();
    bucket->places = *places;
    bucket->dtype = tensor_of(like)->dtype();
    bucket->gradients.resize(n);
    bucket->specs.assign(specs, specs + n);
    for (int64_t i = 0; i < n; ++i) {
        TensorImpl *t = tensor_of(objects[i]);
        if (!take(*bucket, bucket->values, objects[i], specs[i] != nullptr) || t->autograd_meta() == nullptr)
            return nullptr;
        bucket->owners.push_back({objects[i], t, t->autograd_meta(), &t->grad()});
        bucket->sharded |= specs[i] != nullptr;
    }
    return bucket.release();
} catch (...) {
    return nullptr;
}

// Notes the states of the parameters, in place of those that were noted before.
void watch(void *of, int64_t n, PyObject *const *objects, const int64_t *sharded) try {
    Bucket &bucket = *static_cast<Bucket *>(of);
    bucket.states = {};
    bucket.watched = false;
    for (int64_t i = 0; i < n; ++i)
        if (!take(bucket, bucket.states, objects[i], sharded[i])) return;
    bucket.watched = true;
} catch (...) {
}

void forget(void *bucket) { delete static_cast<Bucket *>(bucket); }

// Fills in where the gradients lie, 0 for none. Negative where Python must look: a parameter or state is not what it was,
// or a gradient is not kept as its parameter, or has no memory. Else the sum of 1, if all addresses are multiples of 16,
// and 2, if none is 0.
int gather(void *of, int64_t *addresses) try {
    Bucket &bucket = *static_cast<Bucket *>(of);
    if (!bucket.watched) return -1;
    const int64_t count = bucket.owners.size(), stages = bucket.sharded ? 6 : 3;
    Gradient *gradients = bucket.gradients.data();
    int64_t all = 0;
    bool complete = true;
    for (int64_t i = -stages * AHEAD; i < count; ++i) {
        // What is `stage` stages from being looked at, if there is such.
        const auto from = [=](int64_t stage) {
            const int64_t j = i + stage * AHEAD;
            return 0 <= j && j < count ? j : -1;
        };
        if (const int64_t j = from(stages); j >= 0) {
            ask_for_known(bucket.values, j);
            ask_for(bucket.owners[j].gradient, 0, sizeof(void *));
            if (bucket.sharded) ask_for_tensor(bucket.owners[j].tensor);
        }
        if (const int64_t j = from(stages - 1); j >= 0 && !find_gradient(bucket.owners[j], gradients[j])) return -1;
        if (bucket.sharded) {
            if (const int64_t j = from(4); j >= 0 && !find_object(bucket.specs[j], gradients[j])) return -1;
            if (const int64_t j = from(3); j >= 0 && !find_local(bucket.places, bucket.specs[j], gradients[j])) return -1;
            if (const int64_t j = from(2); j >= 0 && !find_values(bucket.places, bucket.specs[j], gradients[j])) return -1;
        }
        if (const int64_t j = from(1); j >= 0 && gradients[j].tensor != nullptr)
            ask_for_storage(storage_of(gradients[j].tensor));
        if (i < 0) continue;
        if (!as_known(bucket, bucket.values, i)) return -1;
        const TensorImpl *g = gradients[i].tensor;
        int64_t address = 0;
        if (g != nullptr) {
            if (g->dtype() != bucket.dtype || !alike(bucket.values.known[i].tensor, g)) return -1;
            address = reinterpret_cast<int64_t>(g->data());
            if (address == 0) return -1;
        }
        addresses[i] = address;
        all |= address;
        complete &= g != nullptr;
    }
    if (!states_as_known(bucket)) return -1;
    return (all % 16 == 0) + 2 * complete;
} catch (...) {
    return -1;
}

// What is known of a parameter group: its names, then the hyperparameters, and its parameters.
struct Group {
    int64_t items;
    const PyObject *const *item;
    int64_t params;
    const PyObject *const *param;
};

// Whether these are groups of the same parameters in the same order: 1 if they are, and 2 if the hyperparameters are the
// same objects, too. No parameter is read: a thousand may lie outside of all caches.
int groups_hold(PyObject *groups, int64_t n, const Group *noted, PyObject *params) {
    const PyObject *list = reinterpret_cast<PyObject *>(&PyList_Type);
    if (!is_a(list, groups) || PyList_Size(groups) != n) return 0;
    bool same = true;
    for (int64_t i = 0; i < n; ++i) {
        PyObject *group = PyList_GetItem(groups, i), *own = PyDict_GetItem(group, params);
        const Group &known = noted[i];
        if (own == nullptr || !is_a(list, own) || PyList_Size(own) != known.params) return 0;
        for (int64_t j = 0; j < known.params; ++j)
            if (PyList_GetItem(own, j) != known.param[j]) return 0;
        PyObject *name, *value;
        int64_t read = 0;
        for (ssize_t at = 0; same && PyDict_Next(group, &at, &name, &value); ++read)
            same = read < known.items && known.item[read] == name && known.item[known.items + read] == value;
        same &= read == known.items;
    }
    return 1 + same;
}

// Whether none of these parameters has a gradient.
bool without(int64_t n, const PyObject *const *objects) {
    for (int64_t i = 0; i < n; ++i)
        if (tensor_of(objects[i])->grad().defined()) return false;
    return true;
}

// Tells autograd that the parameters that have gradients were written.
void written(const void *of) {
    const Bucket &bucket = *static_cast<const Bucket *>(of);
    const int64_t count = bucket.owners.size();
    const auto values = [&](int64_t i) { return bucket.values.known[i].tensor; };
    for (int64_t i = 0; i < count; ++i) {
        if (i + AHEAD < count)  // all that it has is a pointer to the number
            __builtin_prefetch(*reinterpret_cast<void *const *>(&values(i + AHEAD)->version_counter()));
        if (bucket.owners[i].gradient->defined()) values(i)->bump_version();
    }
}
}
