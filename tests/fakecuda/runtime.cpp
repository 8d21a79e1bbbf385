// The CUDA runtime (cudart). Streams and events hold nothing back: everything is done at once.
#include "runtime.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "cuda_types.h"
#include "memory.h"
#include "settings.h"

namespace {

// ---- errors

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t get_last_error() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t peek_at_last_error() {
  return last_error;
}

const char* get_error_string(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return "an error that fakecuda does not name";
  }
}

// ---- devices: figures of an A100, but for the capability

bool is_device(int device) {
  return device >= 0 && device < settings().devices;
}

cudaError_t get_device_count(int* count) {
  *count = settings().devices;
  return settings().devices > 0 ? cudaSuccess : remember(cudaErrorNoDevice);
}

cudaError_t get_device(int* device) {
  *device = current_device();
  return cudaSuccess;
}

cudaError_t set_device(int device) {
  if (!is_device(device)) return remember(cudaErrorInvalidDevice);
  if (device != current_device()) log_line("SET device %d", device);
  set_current_device(device);
  return cudaSuccess;
}

cudaError_t get_device_properties(cudaDeviceProp* properties, int device) {
  if (!is_device(device)) return remember(cudaErrorInvalidDevice);
  cudaDeviceProp p = {};
  snprintf(p.name, sizeof p.name, "Fake CUDA device sm_%d (computes nothing)",
           settings().capability);
  p.totalGlobalMem = settings().memory_bytes;
  p.sharedMemPerBlock = 48 << 10;
  p.regsPerBlock = 65536;
  p.warpSize = 32;
  p.memPitch = 0x7fffffff;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsDim[0] = 1024;
  p.maxThreadsDim[1] = 1024;
  p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = 0x7fffffff;
  p.maxGridSize[1] = 65535;
  p.maxGridSize[2] = 65535;
  p.clockRate = 1410000;
  p.totalConstMem = 64 << 10;
  p.major = settings().capability / 10;
  p.minor = settings().capability % 10;
  p.textureAlignment = 512;
  p.multiProcessorCount = 108;
  p.canMapHostMemory = 1;
  p.concurrentKernels = 1;
  p.ECCEnabled = 1;
  p.pciBusID = 16 + device;
  p.asyncEngineCount = 3;
  p.unifiedAddressing = 1;
  p.memoryClockRate = 1215000;
  p.memoryBusWidth = 5120;
  p.l2CacheSize = 40 << 20;
  p.maxThreadsPerMultiProcessor = 2048;
  p.streamPrioritiesSupported = 1;
  p.sharedMemPerMultiprocessor = 164 << 10;
  p.regsPerMultiprocessor = 65536;
  p.managedMemory = 1;
  p.computePreemptionSupported = 1;
  p.cooperativeLaunch = 1;
  p.sharedMemPerBlockOptin = 163 << 10;
  p.maxBlocksPerMultiProcessor = 32;
  *properties = p;
  return cudaSuccess;
}

cudaError_t device_get_attribute(int* value, int attribute, int device) {
  cudaDeviceProp p;
  cudaError_t error = get_device_properties(&p, device);
  if (error != cudaSuccess) return error;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = p.maxThreadsPerBlock;
      break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
    case cudaDevAttrMaxBlockDimZ:
      *value = p.maxThreadsDim[attribute - cudaDevAttrMaxBlockDimX];
      break;
    case cudaDevAttrMaxGridDimX:
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *value = p.maxGridSize[attribute - cudaDevAttrMaxGridDimX];
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = p.sharedMemPerBlock;
      break;
    case cudaDevAttrWarpSize:
      *value = p.warpSize;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *value = p.regsPerBlock;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = p.multiProcessorCount;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = p.maxThreadsPerMultiProcessor;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = p.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = p.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = p.sharedMemPerMultiprocessor;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = p.cooperativeLaunch;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = p.sharedMemPerBlockOptin;
      break;
    case cudaDevAttrMemoryPoolsSupported:
      *value = 0;
      break;
    default:
      log_line("MISSING attribute %d of a device", attribute);
      *value = 0;
  }
  return cudaSuccess;
}

cudaError_t device_get_pci_bus_id(char* text, int size, int device) {
  snprintf(text, size, "00000000:%02x:00.0", 16 + device);
  return cudaSuccess;
}

cudaError_t device_get_stream_priority_range(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

cudaError_t get_version(int* version) {
  *version = 11070;
  return cudaSuccess;
}

cudaError_t device_can_access_peer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}

cudaError_t do_nothing() {
  return cudaSuccess;
}

// On a real device the thread would wait here.
void note_wait(const char* what) {
  const char* thread = syscall(SYS_gettid) == getpid() ? "main" : "other";
  log_line("WAIT %s %s device %d", what, thread, current_device());
}

cudaError_t device_synchronize() {
  use_context("cudaDeviceSynchronize");
  note_wait("device");
  return cudaSuccess;
}

cudaError_t stream_synchronize(void*) {
  note_wait("stream");
  return cudaSuccess;
}

cudaError_t event_synchronize(void*) {
  note_wait("event");
  return cudaSuccess;
}

// ---- memory

cudaError_t mem_get_info(size_t* free_bytes, size_t* total_bytes) {
  use_context("cudaMemGetInfo");
  *total_bytes = settings().memory_bytes;
  *free_bytes = settings().memory_bytes - used_bytes(current_device());
  return cudaSuccess;
}

cudaError_t malloc_device(void** pointer, size_t size) {
  use_context("cudaMalloc");
  return remember(allocate(pointer, size));
}

// cudaFree(nullptr) is how programs ask for a context.
cudaError_t free_device(void* pointer) {
  use_context("cudaFree");
  return remember(release(pointer));
}

cudaError_t malloc_host(void** pointer, size_t size) {
  use_context("cudaMallocHost");
  constexpr size_t page = 4096;
  *pointer = aligned_alloc(page, (size + page - 1) / page * page);
  return *pointer ? cudaSuccess : remember(cudaErrorMemoryAllocation);
}

cudaError_t host_alloc(void** pointer, size_t size, unsigned) {
  return malloc_host(pointer, size);
}

cudaError_t free_host(void* pointer) {
  free(pointer);
  return cudaSuccess;
}

// Pages are locked on a real device; here every page of the host will do.
cudaError_t host_register(void*, size_t, unsigned) {
  use_context("cudaHostRegister");
  return cudaSuccess;
}

cudaError_t memcpy_now(void* to, const void* from, size_t size, int kind) {
  use_context("cudaMemcpy");
  note_wait("copy");
  return remember(copy(to, from, size, kind));
}

cudaError_t memcpy_async(void* to, const void* from, size_t size, int kind, void* stream) {
  use_context("cudaMemcpyAsync");
  if (!check_object("cudaMemcpyAsync", "stream", stream)) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  return remember(copy(to, from, size, kind));
}

cudaError_t memset_now(void* to, int value, size_t size) {
  use_context("cudaMemset");
  return remember(fill(to, value, size));
}

cudaError_t memset_async(void* to, int value, size_t size, void* stream) {
  use_context("cudaMemsetAsync");
  if (!check_object("cudaMemsetAsync", "stream", stream)) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  return remember(fill(to, value, size));
}

cudaError_t pointer_get_attributes(cudaPointerAttributes* attributes, const void* pointer) {
  int owner = device_of(pointer);
  void* address = const_cast<void*>(pointer);
  if (owner >= 0) {
    *attributes = {cudaMemoryTypeDevice, owner, address, nullptr};
  } else {
    *attributes = {cudaMemoryTypeUnregistered, current_device(), nullptr, address};
  }
  return cudaSuccess;
}

// A variable on the device: some memory for each, since no kernel will look at it.
cudaError_t get_symbol_address(void** pointer, const void* symbol) {
  static std::mutex guard;
  static std::unordered_map<const void*, void*> known;
  std::lock_guard<std::mutex> lock(guard);
  void*& address = known[symbol];
  if (!address) {
    cudaError_t error = malloc_device(&address, 64 << 10);
    if (error != cudaSuccess) return error;
  }
  *pointer = address;
  return cudaSuccess;
}

// ---- streams and events

cudaError_t create_stream(void** stream) {
  use_context("cudaStreamCreate");
  *stream = new DeviceObject{current_device()};
  return cudaSuccess;
}

cudaError_t create_event(void** event) {
  use_context("cudaEventCreate");
  *event = new DeviceObject{current_device()};
  return cudaSuccess;
}

cudaError_t destroy_object(void* object) {
  delete static_cast<DeviceObject*>(object);
  return cudaSuccess;
}

cudaError_t event_record(void* event, void* stream) {
  if (device_of_object(event) == device_of_object(stream)) return cudaSuccess;
  report_error("cudaEventRecord: two devices mixed: event on device %d, stream on device %d",
               device_of_object(event), device_of_object(stream));
  return remember(cudaErrorInvalidResourceHandle);
}

cudaError_t event_elapsed_time(float* milliseconds, void*, void*) {
  *milliseconds = 1;
  return cudaSuccess;
}

cudaError_t stream_get_flags(void*, unsigned* flags) {
  *flags = 0;
  return cudaSuccess;
}

cudaError_t launch_host_function(void*, void (*function)(void*), void* data) {
  function(data);
  return cudaSuccess;
}

cudaError_t stream_add_callback(void* stream, void (*function)(void*, cudaError_t, void*),
                                void* data, unsigned) {
  function(stream, cudaSuccess, data);
  return cudaSuccess;
}

// ---- kernels

// OneFlow 0.9.0 holds machine code for these and no PTX. Code runs on the same major version from
// its own minor version on.
bool has_kernel_image() {
  const int built_for[] = {60, 61, 70, 75, 80, 86};
  int capability = settings().capability;
  return std::any_of(std::begin(built_for), std::end(built_for), [&](int code) {
    return code / 10 == capability / 10 && code <= capability;
  });
}

struct LaunchConfiguration {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  void* stream;
};
// kernel<<<...>>>(...) pushes one, and the kernel's function on the host takes it.
thread_local std::vector<LaunchConfiguration> configurations;

unsigned push_call_configuration(dim3 grid, dim3 block, size_t shared_bytes, void* stream) {
  configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}

cudaError_t pop_call_configuration(dim3* grid, dim3* block, size_t* shared_bytes, void** stream) {
  if (configurations.empty()) return remember(cudaErrorMissingConfiguration);
  LaunchConfiguration configuration = configurations.back();
  configurations.pop_back();
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_bytes = configuration.shared_bytes;
  *stream = configuration.stream;
  return cudaSuccess;
}

std::mutex launch_guard;
std::unordered_map<const void*, long> launch_counts;
const char* library_base = nullptr;

bool is_good_grid(dim3 grid, dim3 block, size_t shared_bytes) {
  if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) return false;
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return false;
  if (block.x > 1024 || block.y > 1024 || block.z > 64) return false;
  return size_t(block.x) * block.y * block.z <= 1024 && shared_bytes <= 163 << 10;
}

cudaError_t launch_kernel(const void* function, dim3 grid, dim3 block, void**, size_t shared_bytes,
                          void* stream) {
  use_context("cudaLaunchKernel");
  if (!has_kernel_image()) return remember(cudaErrorNoKernelImageForDevice);
  {
    std::lock_guard<std::mutex> lock(launch_guard);
    launch_counts[function]++;
  }
  long offset = static_cast<const char*>(function) - library_base;
  log_line("LAUNCH %lx grid %u %u %u block %u %u %u shared %zu device %d", offset, grid.x, grid.y,
           grid.z, block.x, block.y, block.z, shared_bytes, current_device());
  if (!is_good_grid(grid, block, shared_bytes)) {
    report_error("launch of %lx with grid %u %u %u block %u %u %u shared %zu", offset, grid.x,
                 grid.y, grid.z, block.x, block.y, block.z, shared_bytes);
    return remember(cudaErrorInvalidConfiguration);
  }
  if (!check_object("cudaLaunchKernel", "stream", stream)) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  // A graph that is done within microseconds, as no real one is, can corrupt OneFlow's memory
  // (docs/oneflow-notes.md).
  std::this_thread::sleep_for(std::chrono::microseconds(50));
  return cudaSuccess;
}

cudaError_t active_blocks(int* count, const void*, int, size_t) {
  *count = 2;
  return has_kernel_image() ? cudaSuccess : remember(cudaErrorNoKernelImageForDevice);
}

cudaError_t active_blocks_with_flags(int* count, const void* function, int threads,
                                     size_t shared_bytes, unsigned) {
  return active_blocks(count, function, threads, shared_bytes);
}

cudaError_t func_get_attributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  return has_kernel_image() ? cudaSuccess : remember(cudaErrorNoKernelImageForDevice);
}

// ---- the driver's functions, which OneFlow asks the runtime for by name

int driver_device_get(int* device, int ordinal) {
  *device = ordinal;
  return is_device(ordinal) ? cudaSuccess : cudaErrorInvalidDevice;
}

int driver_primary_context_state(int device, unsigned* flags, int* active) {
  *flags = 0;
  *active = has_context(device);
  return cudaSuccess;
}

int driver_pointer_get_attribute(void* value, int, uintptr_t) {
  memset(value, 0, sizeof(uint64_t));
  return cudaSuccess;
}

cudaError_t get_driver_entry_point(const char* name, void** function, unsigned long long) {
  const std::unordered_map<std::string, void*> known = {
      {"cuDeviceGet", reinterpret_cast<void*>(driver_device_get)},
      {"cuDevicePrimaryCtxGetState", reinterpret_cast<void*>(driver_primary_context_state)},
      {"cuPointerGetAttribute", reinterpret_cast<void*>(driver_pointer_get_attribute)},
  };
  auto found = known.find(name);
  if (found == known.end()) {
    log_line("MISSING %s", name);
    *function = nullptr;
    return remember(cudaErrorNotSupported);
  }
  *function = found->second;
  return cudaSuccess;
}

template <typename Function>
void* address(Function* function) {
  return reinterpret_cast<void*>(function);
}

}  // namespace

void set_library_base(const void* base) {
  library_base = static_cast<const char*>(base);
}

const std::unordered_map<std::string, void*>& runtime_functions() {
  static const std::unordered_map<std::string, void*> functions = {
      {"cudaGetLastError", address(get_last_error)},
      {"cudaPeekAtLastError", address(peek_at_last_error)},
      {"cudaGetErrorString", address(get_error_string)},
      {"cudaGetErrorName", address(get_error_string)},
      {"cudaGetDeviceCount", address(get_device_count)},
      {"cudaGetDevice", address(get_device)},
      {"cudaSetDevice", address(set_device)},
      {"cudaSetDeviceFlags", address(do_nothing)},
      {"cudaGetDeviceProperties", address(get_device_properties)},
      {"cudaDeviceGetAttribute", address(device_get_attribute)},
      {"cudaDeviceGetPCIBusId", address(device_get_pci_bus_id)},
      {"cudaDeviceGetStreamPriorityRange", address(device_get_stream_priority_range)},
      {"cudaDeviceCanAccessPeer", address(device_can_access_peer)},
      {"cudaDeviceEnablePeerAccess", address(do_nothing)},
      {"cudaDeviceSynchronize", address(device_synchronize)},
      {"cudaDeviceReset", address(do_nothing)},
      {"cudaRuntimeGetVersion", address(get_version)},
      {"cudaDriverGetVersion", address(get_version)},
      {"cudaGetDriverEntryPoint", address(get_driver_entry_point)},
      {"cudaProfilerStart", address(do_nothing)},
      {"cudaProfilerStop", address(do_nothing)},
      {"cudaMemGetInfo", address(mem_get_info)},
      {"cudaMalloc", address(malloc_device)},
      {"cudaFree", address(free_device)},
      {"cudaMallocHost", address(malloc_host)},
      {"cudaHostAlloc", address(host_alloc)},
      {"cudaFreeHost", address(free_host)},
      {"cudaHostRegister", address(host_register)},
      {"cudaHostUnregister", address(do_nothing)},
      {"cudaMemcpy", address(memcpy_now)},
      {"cudaMemcpyAsync", address(memcpy_async)},
      {"cudaMemset", address(memset_now)},
      {"cudaMemsetAsync", address(memset_async)},
      {"cudaPointerGetAttributes", address(pointer_get_attributes)},
      {"cudaGetSymbolAddress", address(get_symbol_address)},
      {"cudaStreamCreate", address(create_stream)},
      {"cudaStreamCreateWithFlags", address(create_stream)},
      {"cudaStreamCreateWithPriority", address(create_stream)},
      {"cudaStreamDestroy", address(destroy_object)},
      {"cudaStreamSynchronize", address(stream_synchronize)},
      {"cudaStreamQuery", address(do_nothing)},
      {"cudaStreamWaitEvent", address(do_nothing)},
      {"cudaStreamGetFlags", address(stream_get_flags)},
      {"cudaStreamAddCallback", address(stream_add_callback)},
      {"cudaLaunchHostFunc", address(launch_host_function)},
      {"cudaEventCreate", address(create_event)},
      {"cudaEventCreateWithFlags", address(create_event)},
      {"cudaEventDestroy", address(destroy_object)},
      {"cudaEventRecord", address(event_record)},
      {"cudaEventQuery", address(do_nothing)},
      {"cudaEventSynchronize", address(event_synchronize)},
      {"cudaEventElapsedTime", address(event_elapsed_time)},
      {"__cudaPushCallConfiguration", address(push_call_configuration)},
      {"__cudaPopCallConfiguration", address(pop_call_configuration)},
      {"cudaLaunchKernel", address(launch_kernel)},
      {"cudaOccupancyMaxActiveBlocksPerMultiprocessor", address(active_blocks)},
      {"cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", address(active_blocks_with_flags)},
      {"cudaFuncGetAttributes", address(func_get_attributes)},
      {"cudaFuncSetAttribute", address(do_nothing)},
      {"cudaFuncSetCacheConfig", address(do_nothing)},
  };
  return functions;
}

// Fills `functions` and `counts` with at most `size` kernels; returns how many there are.
EXPORT long fakecuda_launches(const void** functions, long* counts, long size) {
  std::lock_guard<std::mutex> lock(launch_guard);
  long found = 0;
  for (auto [function, count] : launch_counts) {
    if (found < size) {
      functions[found] = function;
      counts[found] = count;
    }
    found++;
  }
  return found;
}
