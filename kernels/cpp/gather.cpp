// The addresses of the gradients of many parameters, gathered in one call that makes no Python object of any: to ask
// for them one by one takes longer than all else that the host does in a step. Parameters and states are looked at, too:
// whether each lies where it did.
// It is compiled as one text with known_tensors.h, which comes first.
#include <memory>

extern "C" {

extern char PyList_Type;  // of which only the address is taken
ssize_t PyList_Size(PyObject *);
ssize_t PyTuple_Size(PyObject *);
PyObject *PyList_GetItem(PyObject *, ssize_t);
PyObject *PyTuple_GetItem(PyObject *, ssize_t);
PyObject *PyDict_GetItem(PyObject *, PyObject *);
int PyDict_Next(PyObject *, ssize_t *, PyObject **, PyObject **);
void *PyEval_SaveThread();
void PyEval_RestoreThread(void *);
PyObject *PyLong_FromLong(long);
void *PyLong_AsVoidPtr(PyObject *);

// What Python needs to know of a function to call it itself, which takes a fifth of what ctypes takes.
struct PyMethodDef {
    const char *name;
    void *function;
    int flags;
    const char *doc;
};
PyObject *PyCFunction_NewEx(PyMethodDef *, PyObject *, PyObject *);
}

namespace {

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
    Offsets offsets;
    caffe2::TypeMeta dtype;  // of the gradients
    Tensors values, states;
    std::vector<Owner> owners;
    std::vector<PyObject *> specs;  // how the gradient of each is sharded, null for an ordinary one
    std::vector<Gradient> gradients;  // in a call
    int64_t *addresses;               // of the gradients, that a call finds
    bool sharded = false;             // whether there are sharded parameters
    bool watched = true;              // whether all states can be looked at
};

// A tensor's Python object, null for none.
template <class Slot>
PyObject *object_in(const Slot &slot) {
    if constexpr (requires { slot.load_pyobj(); })
        return slot.load_pyobj();
    else
        return slot._unchecked_untagged_pyobj();  // before torch 2.12
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

bool find_local(const Offsets &offsets, const PyObject *spec, Gradient &gradient) {
    if (spec == nullptr || gradient.tensor == nullptr) return true;
    if (!is_a(offsets.sharded, gradient.object) || at<PyObject>(gradient.object, offsets.spec) != spec) return false;
    gradient.object = at<PyObject>(gradient.object, offsets.local);
    ask_for_object(gradient.object);
    return gradient.object != nullptr;
}

bool find_values(const Offsets &offsets, const PyObject *spec, Gradient &gradient) {
    if (spec == nullptr || gradient.tensor == nullptr) return true;
    if (!is_a(offsets.plain, gradient.object)) return false;
    gradient.tensor = tensor_of(gradient.object);
    ask_for_tensor(gradient.tensor);
    return true;
}

// The keys that say how a tensor is kept, and not whether autograd follows it.
c10::DispatchKeySet kept(c10::DispatchKeySet keys) { return keys - c10::autograd_dispatch_keyset_with_ADInplaceOrView; }

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

void begin(int64_t offset) { tensor_offset = offset; }

// Notes parameters. `specs` has a null for each that is an ordinary tensor; `like` is a tensor of the gradients' dtype;
// `addresses` is for those that a call finds. Null where one of them is of a kind that Python must look at.
void *note(const Offsets *offsets, int64_t n, PyObject *const *objects, PyObject *const *specs, const PyObject *like,
           int64_t *addresses) try {
    auto bucket = std::make_unique<Bucket>();
    bucket->offsets = bucket->values.offsets = *offsets;
    bucket->dtype = tensor_of(like)->dtype();
    bucket->gradients.resize(n);
    bucket->specs.assign(specs, specs + n);
    bucket->addresses = addresses;
    for (int64_t i = 0; i < n; ++i) {
        TensorImpl *t = tensor_of(objects[i]);
        if (!bucket->values.take(objects[i], specs[i] != nullptr) || t->autograd_meta() == nullptr)
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
    bucket.states = {bucket.offsets};
    bucket.watched = false;
    for (int64_t i = 0; i < n; ++i)
        if (!bucket.states.take(objects[i], sharded[i])) return;
    bucket.watched = true;
} catch (...) {
}

void forget(void *bucket) { delete static_cast<Bucket *>(bucket); }

// Fills in where the gradients lie, 0 for none. Negative where Python must look: a parameter or state is not what it was,
// or a gradient is not kept as its parameter, or has no memory. Else the sum of 1, if all addresses are multiples of 16,
// and 2, if none is 0.
int gather(void *of) try {
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
            bucket.values.ask_for_one(j);
            ask_for(bucket.owners[j].gradient, 0, sizeof(void *));
            if (bucket.sharded) ask_for_tensor(bucket.owners[j].tensor);
        }
        if (const int64_t j = from(stages - 1); j >= 0 && !find_gradient(bucket.owners[j], gradients[j])) return -1;
        if (bucket.sharded) {
            if (const int64_t j = from(4); j >= 0 && !find_object(bucket.specs[j], gradients[j])) return -1;
            if (const int64_t j = from(3); j >= 0 && !find_local(bucket.offsets, bucket.specs[j], gradients[j])) return -1;
            if (const int64_t j = from(2); j >= 0 && !find_values(bucket.offsets, bucket.specs[j], gradients[j])) return -1;
        }
        if (const int64_t j = from(1); j >= 0 && gradients[j].tensor != nullptr)
            ask_for_storage(storage_of(gradients[j].tensor));
        if (i < 0) continue;
        if (!bucket.values.as_known(i)) return -1;
        const TensorImpl *g = gradients[i].tensor;
        int64_t address = 0;
        if (g != nullptr) {
            if (g->dtype() != bucket.dtype || !alike(bucket.values.known[i].tensor, g)) return -1;
            address = reinterpret_cast<int64_t>(g->data());
            if (address == 0) return -1;
        }
        bucket.addresses[i] = address;
        all |= address;
        complete &= g != nullptr;
    }
    if (!bucket.states.all_as_known()) return -1;
    return (all % 16 == 0) + 2 * complete;
} catch (...) {
    return -1;
}

// What is known of a parameter group: tuples of its names and of its values, null where the values may be others now,
// and its parameters.
struct Group {
    PyObject *names, *values;
    int64_t params;
    const PyObject *const *param;
};

// Parameter groups, each a `Group` that comes after this.
struct Groups {
    int64_t count;
    PyObject *params;  // their key
};

// Whether these are groups of the same parameters in the same order: 1 if they are, and 2 if the hyperparameters are the
// same objects, too. No parameter is read: a thousand may lie outside of all caches.
int groups_hold(PyObject *groups, const Groups *all) {
    const Group *noted = reinterpret_cast<const Group *>(all + 1);
    const PyObject *list = reinterpret_cast<PyObject *>(&PyList_Type);
    if (!is_a(list, groups) || PyList_Size(groups) != all->count) return 0;
    bool same = true;
    for (int64_t i = 0; i < all->count; ++i) {
        PyObject *group = PyList_GetItem(groups, i), *own = PyDict_GetItem(group, all->params);
        const Group &known = noted[i];
        if (own == nullptr || !is_a(list, own) || PyList_Size(own) != known.params) return 0;
        for (int64_t j = 0; j < known.params; ++j)
            if (PyList_GetItem(own, j) != known.param[j]) return 0;
        PyObject *name, *value;
        same &= known.values != nullptr;
        const ssize_t items = same ? PyTuple_Size(known.names) : 0;
        ssize_t read = 0;
        for (ssize_t at = 0; same && PyDict_Next(group, &at, &name, &value); ++read)
            same = read < items && PyTuple_GetItem(known.names, read) == name &&
                   PyTuple_GetItem(known.values, read) == value;
        same &= read == items;
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
        if (bucket.addresses[i]) values(i)->bump_version();
    }
}

// Runs the compiled loop of a bucket, during which other threads run Python, and tells autograd.
void run(const void *of, void (*step)(const void *), const void *given) {
    void *thread = PyEval_SaveThread();
    step(given);
    PyEval_RestoreThread(thread);
    written(of);
}

// Those of the above that each step calls, as functions of Python. An address is an int.

static PyObject *call_gather(PyObject *, PyObject *bucket) { return PyLong_FromLong(gather(PyLong_AsVoidPtr(bucket))); }

static PyObject *call_groups_hold(PyObject *, PyObject *const *given, ssize_t) {
    return PyLong_FromLong(groups_hold(given[0], static_cast<const Groups *>(PyLong_AsVoidPtr(given[1]))));
}

static PyObject *call_run(PyObject *, PyObject *const *given, ssize_t) {
    using Step = void(const void *);
    run(PyLong_AsVoidPtr(given[0]), reinterpret_cast<Step *>(PyLong_AsVoidPtr(given[1])), PyLong_AsVoidPtr(given[2]));
    return PyLong_FromLong(0);
}

static PyObject *call_written(PyObject *, PyObject *bucket) {
    written(PyLong_AsVoidPtr(bucket));
    return PyLong_FromLong(0);
}

constexpr int ONE = 0x8, ANY_NUMBER = 0x80;  // METH_O, METH_FASTCALL

static PyMethodDef METHODS[] = {
    {"gather", reinterpret_cast<void *>(call_gather), ONE, nullptr},
    {"groups_hold", reinterpret_cast<void *>(call_groups_hold), ANY_NUMBER, nullptr},
    {"run", reinterpret_cast<void *>(call_run), ANY_NUMBER, nullptr},
    {"written", reinterpret_cast<void *>(call_written), ONE, nullptr},
};

PyObject *method(int64_t number) { return PyCFunction_NewEx(&METHODS[number], nullptr, nullptr); }
}
