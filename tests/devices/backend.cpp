// A stand-in for CUDA with two devices: their memory is the host's, and CPU kernels compute.
//
// What it keeps of CUDA: tensors of different devices do not mix; each thread has its current device
// and its current streams; a copy to pinned memory that need not be waited for arrives only when its
// stream, its event or its device is waited for, and until then the host finds ones there.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <deque>
#include <map>
#include <mutex>
#include <set>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::IValue;

namespace {

constexpr int NUM_DEVICES = 2;
constexpr auto CUDA = c10::DeviceType::CUDA;

thread_local DeviceIndex current_device = 0;
thread_local int64_t current_stream[NUM_DEVICES] = {0, 0};

std::recursive_mutex lock;
std::set<int> forbidden;  // devices on which nothing may be done
std::vector<std::string> faults;
// Who frees pinned memory may hold Python's lock, for which who copies may wait with the lock above.
std::mutex pinned_lock;
std::map<const char*, size_t> pinned;  // start and size of pinned memory

bool is_forbidden(int device) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  return forbidden.count(device);
}

void touch(int device) { TORCH_CHECK(!is_forbidden(device), "cuda:", device, " is used"); }

// ------------------------------------------------------------------------------------- streams

// What a stream has yet to do with host memory. `write` fills it; else it is only being read.
struct Pending {
  Tensor host, snapshot;
  bool write;
};

struct Stream {
  std::deque<Pending> pending;
  int64_t submitted = 0, completed = 0;
};

std::map<std::pair<int, int64_t>, Stream> streams;

bool same_bytes(const Tensor& one, const Tensor& other) {
  auto a = one.contiguous(), b = other.contiguous();
  return a.nbytes() == b.nbytes() && !std::memcmp(a.data_ptr(), b.data_ptr(), a.nbytes());
}

void complete(Stream& stream, int64_t position) {
  while (stream.completed < position) {
    auto action = stream.pending.front();
    stream.pending.pop_front();
    ++stream.completed;
    if (action.write) {
      action.host.copy_(action.snapshot);
    } else if (!same_bytes(action.host, action.snapshot)) {
      faults.push_back("host memory changed while a copy from it to a device was under way");
    }
  }
}

bool overlap(const Tensor& one, const Tensor& other) {
  auto begin = [](const Tensor& t) { return static_cast<const char*>(t.storage().data()); };
  return begin(one) < begin(other) + other.storage().nbytes() &&
      begin(other) < begin(one) + one.storage().nbytes();
}

Stream& stream_of(int device) { return streams[{device, current_stream[device]}]; }

// A stream works in order: what comes next finds the earlier work on the same host memory done.
void complete_overlapping(Stream& stream, const Tensor& host) {
  int64_t position = 0;
  for (size_t k = 0; k < stream.pending.size(); ++k)
    if (overlap(stream.pending[k].host, host)) position = stream.completed + k + 1;
  complete(stream, position);
}

// -------------------------------------------------------------------------------------- memory

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    touch(current_device);
    void* data = std::malloc(size ? size : 1);
    return {data, data, &std::free, Device(CUDA, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t size) const override {
    std::memcpy(to, from, size);
  }
} device_allocator;

void unpin(void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  pinned.erase(static_cast<char*>(data));
  std::free(data);
}

struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t size) override {
    touch(current_device);  // as cudaHostAlloc makes a context there
    void* data = std::malloc(size ? size : 1);
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned[static_cast<char*>(data)] = size ? size : 1;
    return {data, data, &unpin, Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, std::size_t size) const override {
    std::memcpy(to, from, size);
  }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
} pinned_allocator;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  if (after == pinned.begin()) return false;
  auto [start, size] = *std::prev(after);
  return static_cast<const char*>(data) < start + size;
}

// ------------------------------------------------------------------- what torch asks of a device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  Device exchangeDevice(Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(CUDA, current_device); }
  void setDevice(Device device) const override {
    if (device.index() >= 0) current_device = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  c10::Stream getStream(Device device) const override {
    int index = device.index() < 0 ? current_device : device.index();
    return c10::Stream(c10::Stream::UNSAFE, Device(CUDA, index), current_stream[index]);
  }
  c10::Stream getDefaultStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(stream.device());
    current_stream[stream.device_index()] = stream.id();
    return before;
  }
  void record(void**, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  DeviceIndex deviceCount() const noexcept override { return NUM_DEVICES; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
} device_guard;

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return NUM_DEVICES; }
  int getNumGPUs() const override { return NUM_DEVICES; }
  DeviceIndex current_device() const override { return ::current_device; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
};

// -------------------------------------------------------------------------------------- kernels

c10::intrusive_ptr<c10::TensorImpl> impl_on(
    c10::Storage storage, c10::DispatchKey key, const Tensor& like) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), like.dtype());
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return impl;
}

// Runs an operator's CPU kernel on a device's tensors: aliases of them on the CPU go in, and what
// comes out, or is resized, belongs to the device.
class CpuCall {
 public:
  explicit CpuCall(std::string name) : name_(std::move(name)) {}

  Tensor alias(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      if (tensor.dim() > 0) on_host_ = true;
      return tensor;
    }
    auto index = tensor.device().index();
    TORCH_CHECK(
        device_ < 0 || device_ == index,
        "Expected all tensors to be on the same device, but found at least two devices, cuda:",
        int(device_), " and cuda:", int(index), "! (", name_, ")");
    device_ = index;
    auto* origin = tensor.storage().unsafeGetStorageImpl();
    auto& storage = aliases_[origin];
    if (!storage) {
      storage = c10::Storage(c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), origin->nbytes(),
          c10::DataPtr(origin->mutable_data(), Device(c10::DeviceType::CPU)),
          c10::GetAllocator(c10::DeviceType::CPU), true));
      origins_[storage.unsafeGetStorageImpl()] = tensor.storage();
    }
    Tensor result(impl_on(storage, c10::DispatchKey::CPU, tensor));
    inputs_.push_back({tensor, result});
    return result;
  }

  void require_one_device() const {
    TORCH_CHECK(
        !on_host_ || device_ < 0,
        "Expected all tensors to be on the same device, but found at least two devices, cuda:",
        int(device_), " and cpu! (", name_, ")");
  }

  // Gives inputs the sizes and the memory that the kernel gave to their aliases.
  void write_back() {
    for (auto& [alias, origin] : origins_) {
      if (alias->data() == origin.data()) continue;
      hold(origin.unsafeGetStorageImpl(), alias);
    }
    for (auto& [tensor, alias] : inputs_)
      if (tensor.sizes() != alias.sizes() || tensor.strides() != alias.strides())
        tensor.unsafeGetTensorImpl()->set_sizes_and_strides(
            alias.sizes(), alias.strides(), alias.storage_offset());
  }

  Tensor result(const Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (auto& [input, alias] : inputs_)
      if (alias.is_same(tensor)) return input;
    auto* own = tensor.storage().unsafeGetStorageImpl();
    auto& storage = origins_[own];
    if (!storage) {
      storage = c10::Storage(c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), own->nbytes(),
          c10::DataPtr(nullptr, Device(CUDA, device_)), &device_allocator, true));
      hold(storage.unsafeGetStorageImpl(), own);
    }
    return Tensor(impl_on(storage, c10::DispatchKey::CUDA, tensor));
  }

  DeviceIndex device() const { return device_; }

 private:
  // Makes a device's storage own the memory of a CPU's.
  void hold(c10::StorageImpl* storage, c10::StorageImpl* owner) {
    using Owner = c10::intrusive_ptr<c10::StorageImpl>;
    auto* held = new Owner(Owner::reclaim_copy(owner));
    storage->set_nbytes(owner->nbytes());
    storage->set_data_ptr_noswap(c10::DataPtr(
        owner->mutable_data(), held, [](void* data) { delete static_cast<Owner*>(data); },
        Device(CUDA, device_)));
  }

  std::string name_;
  DeviceIndex device_ = -1;
  bool on_host_ = false;
  std::map<c10::StorageImpl*, c10::Storage> aliases_;
  std::map<c10::StorageImpl*, c10::Storage> origins_;
  std::vector<std::pair<Tensor, Tensor>> inputs_;
};

// Indices may be in host memory.
bool takes_host_indices(const std::string& name) {
  return name.starts_with("aten::index") || name.starts_with("aten::_index") ||
      name.starts_with("aten::_unsafe_index");
}

template <class Convert>
IValue converted(const IValue& value, Convert convert) {
  if (value.isTensor()) return convert(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(convert(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorList())
      list.push_back(tensor ? std::optional<Tensor>(convert(*tensor)) : std::nullopt);
    return list;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return Device(c10::DeviceType::CPU);
  return value;
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto name = c10::toString(op.operator_name());
  auto count = op.schema().arguments().size();
  CpuCall call(name);
  for (auto at = stack->size() - count; at < stack->size(); ++at)
    (*stack)[at] = converted((*stack)[at], [&](const Tensor& tensor) { return call.alias(tensor); });
  if (!takes_host_indices(name)) call.require_one_device();
  touch(call.device());
  if (name == "aten::_local_scalar_dense") {
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto& stream = stream_of(call.device());
    complete(stream, stream.submitted);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.write_back();
  for (auto at = stack->size() - op.schema().returns().size(); at < stack->size(); ++at)
    (*stack)[at] = converted((*stack)[at], [&](const Tensor& tensor) { return call.result(tensor); });
}

Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(Device(CUDA, current_device)));
  return at::detail::empty_generic_symint(
      size, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(CUDA, current_device)));
  return at::detail::empty_strided_symint_generic(
      size, stride, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      dtype.value_or(at::get_default_dtype_as_scalartype()));
}

Tensor& set_source(
    Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  impl->set_sizes_contiguous(sizes);
  if (stride.size() == size.size())
    impl->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride));
  impl->set_storage_offset(offset.expect_int());
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source) {
  int64_t count = source.nbytes() / self.dtype().itemsize();
  return set_source(self, std::move(source), 0, c10::SymIntArrayRef({c10::SymInt(count)}), {});
}

// Without autograd, whose part is done: an alias on the CPU.
Tensor aliased(const Tensor& tensor) {
  CpuCall call("copy_");
  return call.alias(tensor);
}

Tensor& copy(Tensor& to, const Tensor& from, bool non_blocking) {
  at::AutoDispatchBelowAutograd below;
  int device = from.is_cuda() ? from.device().index() : to.device().index();
  touch(device);
  std::lock_guard<std::recursive_mutex> guard(lock);
  auto& stream = stream_of(device);
  auto target = aliased(to), source = aliased(from);
  if (to.is_cuda() && from.is_cuda()) {
    target.copy_(source);
    return to;
  }
  const Tensor& host = to.is_cuda() ? source : target;
  complete_overlapping(stream, host);
  bool late = non_blocking && is_pinned(host.data_ptr());
  if (!late) complete(stream, stream.submitted);
  if (to.is_cuda()) {
    target.copy_(source.expand(target.sizes()));
    if (late) stream.pending.push_back({source, source.clone(), false});
  } else if (late) {
    auto snapshot = at::empty_like(target).copy_(source.expand(target.sizes()));
    target.fill_(1);
    stream.pending.push_back({target, snapshot, true});
  } else {
    target.copy_(source.expand(target.sizes()));
  }
  if (late) ++stream.submitted;
  return to;
}

int64_t math_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;  // sdp::SDPBackend::math
}

void record_stream(Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("set_.source_Storage_storage_offset", &set_source);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("copy_", &copy);
  library.impl("_fused_sdp_choice", &math_attention);
  library.impl("record_stream", &record_stream);
}

struct Loaded {
  Loaded() {
    c10::SetAllocator(CUDA, &device_allocator);
    at::setHostAllocator(CUDA, &pinned_allocator);
    static c10::impl::DeviceGuardImplRegistrar registrar(CUDA, &device_guard);
  }
} loaded;

}  // namespace

namespace at {
using CUDAHooks = ::Hooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

// ----------------------------------------------------------------------- what Python asks (ctypes)

extern "C" {
int get_device() { return current_device; }
void set_device(int device) { current_device = device; }
int64_t get_stream(int device) { return current_stream[device]; }
void set_stream(int device, int64_t stream) { current_stream[device] = stream; }
int64_t submitted(int device, int64_t stream) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  return streams[{device, stream}].submitted;
}
int64_t completed(int device, int64_t stream) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  return streams[{device, stream}].completed;
}
void complete_to(int device, int64_t stream, int64_t position) {
  at::AutoDispatchBelowAutograd below;
  std::lock_guard<std::recursive_mutex> guard(lock);
  complete(streams[{device, stream}], position);
}
void complete_device(int device) {
  at::AutoDispatchBelowAutograd below;
  std::lock_guard<std::recursive_mutex> guard(lock);
  for (auto& [key, stream] : streams)
    if (key.first == device) complete(stream, stream.submitted);
}
int may_use(int device) { return !is_forbidden(device); }
void forbid(int device, int on) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  on ? (void)forbidden.insert(device) : (void)forbidden.erase(device);
}
void forget_faults() {
  std::lock_guard<std::recursive_mutex> guard(lock);
  faults.clear();
}
int num_faults() {
  std::lock_guard<std::recursive_mutex> guard(lock);
  return faults.size();
}
}
