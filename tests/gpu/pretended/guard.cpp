// What PyTorch asks the machine about its CUDA devices, answered for two that are not there. Streams and events do
// nothing: all work is done when it is asked for. `put_on` and `take_off` may be called at any time.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace torch::utils {
void set_requires_device_init(at::DeviceType device_type, bool value);
}

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

constexpr DeviceIndex kDevices = 2;
thread_local DeviceIndex current = 0;

DeviceIndex exchange(DeviceIndex next) {
  DeviceIndex before = current;
  if (next >= 0) current = next;
  return before;
}

struct PretendedGuard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device next) const override { return Device(DeviceType::CUDA, exchange(next.index())); }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device next) const override { exchange(next.index()); }
  void uncheckedSetDevice(Device next) const noexcept override { exchange(next.index()); }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return Stream(Stream::DEFAULT, stream.device()); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

struct PretendedHooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 0; }  // those that have generators to seed: none
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex next) const override { exchange(next); }
  DeviceIndex exchangeDevice(DeviceIndex next) const override { return exchange(next); }
  DeviceIndex maybeExchangeDevice(DeviceIndex next) const override { return exchange(next); }
};

const c10::impl::DeviceGuardImplInterface* guard_before = nullptr;
void* table_before = nullptr;

// PyTorch makes its hooks once and keeps them. An object without members is what its table of functions says it is.
void** table_of(const at::CUDAHooksInterface& hooks) {
  return reinterpret_cast<void**>(const_cast<at::CUDAHooksInterface*>(&hooks));
}

}  // namespace

extern "C" {

void put_on() {
  static PretendedGuard guard;
  static PretendedHooks hooks;
  guard_before = c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].exchange(&guard);
  void** table = table_of(at::detail::getCUDAHooks());
  table_before = *table;
  *table = *table_of(hooks);
}

void take_off() {
  *table_of(at::detail::getCUDAHooks()) = table_before;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(guard_before);
  torch::utils::set_requires_device_init(DeviceType::CUDA, true);
  current = 0;
}

int current_device() { return current; }

int set_device(int next) { return exchange(static_cast<DeviceIndex>(next)); }
}
