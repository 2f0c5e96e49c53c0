// A device whose memory is host memory that no operation of the CPU takes: what torch calls PrivateUse1. Operations
// copy their arguments to the CPU and their results back.

#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>

namespace {

constexpr auto ELSEWHERE = c10::DeviceType::PrivateUse1;

struct Memory final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        void *at = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
        return {at, at, &std::free, c10::Device(ELSEWHERE, 0)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
    void copy_data(void *to, const void *from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} memory;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<ELSEWHERE> {
    c10::Device getDevice() const override { return {ELSEWHERE, 0}; }
    c10::Device exchangeDevice(c10::Device) const override { return {ELSEWHERE, 0}; }
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

const c10::DispatchKeySet KEY(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, KEY,
                                     dtype.value_or(at::ScalarType::Float), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
    return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                             KEY, dtype.value_or(at::ScalarType::Float));
}

// The same memory as the CPU's.
at::Tensor on_host(const at::Tensor &t) {
    if (t.is_cpu()) return t;
    const auto &own = t.storage();
    c10::Storage storage(c10::Storage::use_byte_size_t(), own.nbytes(), {own.mutable_data(), at::kCPU}, nullptr, false);
    auto seen = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                         t.dtype());
    seen.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    return seen;
}

at::Tensor copy_from(const at::Tensor &from, const at::Tensor &to, bool) {
    on_host(to).copy_(on_host(from));
    return to;
}

const at::Tensor &resize(const at::Tensor &t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
    const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
    if (t.sizes() != sizes) {
        const auto own = at::detail::empty_generic(sizes, &memory, KEY, t.scalar_type(), std::nullopt);
        t.unsafeGetTensorImpl()->set_storage_keep_dtype(own.storage());
        t.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
    }
    return t;
}

at::Tensor copy_from_and_resize(const at::Tensor &from, const at::Tensor &to) {
    to.resize_(from.sizes());
    return copy_from(from, to, false);
}

void on_cpu(const c10::OperatorHandle &op, torch::jit::Stack *stack) { at::native::cpu_fallback(op, stack); }

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("_copy_from", copy_from);
    m.impl("_copy_from_and_resize", copy_from_and_resize);
    m.impl("as_strided", at::native::as_strided_tensorimpl);
    m.impl("view", at::native::view);
    m.impl("_reshape_alias", at::native::_reshape_alias);
    m.impl("resize_", resize);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
    m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}
