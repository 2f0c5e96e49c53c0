// Tensors as they were when they were noted: whether each is still kept as it was, and lies where it did. All is read
// where torch and Python keep it, and no Python object is made.
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

extern "C" {

// Of Python's stable interface, so that its headers need not be installed.
void Py_DecRef(PyObject *);
PyObject *PyObject_Type(PyObject *);
}

namespace {

using c10::TensorImpl;

// What gather.py knows of Python's objects: where in a DTensor what it holds is, in bytes, and the classes.
struct Offsets {
    int64_t local, spec;
    const PyObject *plain, *sharded;
};

int64_t tensor_offset = 0;  // where in a tensor's object the tensor is

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

template <class T>
T *at(const PyObject *object, int64_t offset) {
    return *reinterpret_cast<T *const *>(reinterpret_cast<const char *>(object) + offset);
}

TensorImpl *tensor_of(const PyObject *object) { return at<TensorImpl>(object, tensor_offset); }

c10::StorageImpl *storage_of(const TensorImpl *t) { return t->unsafe_storage().unsafeGetStorageImpl(); }

bool is_a(const PyObject *type, PyObject *object) {
    PyObject *own = PyObject_Type(object);
    Py_DecRef(own);
    return own == type;
}

// After a backward pass none of what is read is in a cache. While one tensor is looked at, the processor is asked for
// what the next ones will need, so that it waits for many lines at once, not for one after the other. Where something
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

struct Tensors {
    Offsets offsets;
    std::vector<Known> known;
    std::vector<PyObject *> sharded;  // the DTensor of each, null for an ordinary tensor; empty where all are ordinary
    std::vector<Kind> kinds;

    // Takes note of a tensor. False where it is of a kind that Python must look at.
    bool take(PyObject *object, bool in_parts) {
        if (in_parts) {
            sharded.resize(known.size());
            sharded.push_back(object);
            if (!is_a(offsets.sharded, object)) return false;
            object = at<PyObject>(object, offsets.local);
            if (object == nullptr || !is_a(offsets.plain, object)) return false;
        } else if (!sharded.empty()) {
            sharded.push_back(nullptr);
        }
        TensorImpl *t = tensor_of(object);
        if (t->is_inference() || t->is_python_dispatch() || t->layout() != c10::kStrided) return false;
        if (t->mutable_data() == nullptr && t->numel() != 0) return false;
        c10::StorageImpl *storage = storage_of(t);
        size_t kind = known.empty() ? 0 : known.back().kind;
        if (kind >= kinds.size() || !kinds[kind].is_of(t))
            for (kind = 0; kind < kinds.size() && !kinds[kind].is_of(t);) ++kind;
        if (kind == kinds.size())
            kinds.push_back({t->key_set(), t->dtype(), t->is_contiguous(), t->sizes().vec(), t->strides().vec()});
        known.push_back({object, t, storage, storage->mutable_data(), t->storage_offset(), kind});
        return true;
    }

    void ask_for_one(int64_t i) const {
        ask_for_object(known[i].object);
        ask_for_tensor(known[i].tensor);
        ask_for_storage(known[i].storage);
        if (!sharded.empty()) ask_for_sharded(sharded[i]);
    }

    // Whether a tensor is what it was, and lies where it did.
    bool as_known(int64_t i) const {
        const Known &own = known[i];
        if (!sharded.empty() && sharded[i] != nullptr && at<PyObject>(sharded[i], offsets.local) != own.object)
            return false;
        const TensorImpl *t = own.tensor;
        // Of memory that is shared until it is written, the storage makes its own copy here, which lies elsewhere.
        return tensor_of(own.object) == t && storage_of(t) == own.storage && t->storage_offset() == own.offset &&
               own.storage->mutable_data() == own.memory && kinds[own.kind].is_of(t);
    }

    bool all_as_known() const {
        const int64_t count = known.size();
        for (int64_t i = 0; i < count; ++i) {
            if (i + AHEAD < count) ask_for_one(i + AHEAD);
            if (!as_known(i)) return false;
        }
        return true;
    }
};

}  // namespace
