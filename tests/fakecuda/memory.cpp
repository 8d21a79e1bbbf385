// All devices share one sparse memory file, which is mapped twice: where OneFlow sees it, without
// any access, so that a host that reads or writes there dies as it would with a real device; and
// once more for the copies made here.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "settings.h"

namespace {

constexpr size_t kAlignment = 512;         // of allocations, as CUDA's
constexpr size_t kGiveBackBytes = 1 << 20;  // smaller blocks are not worth a system call

struct Device {
  size_t used = 0;
  size_t peak = 0;
  char* unused = nullptr;                 // first address that was never handed out
  std::multimap<size_t, char*> released;  // by size
  bool context = false;
};

std::mutex guard;  // of everything below
Device devices[kMaxDevices];
std::map<char*, size_t> allocations;
// What the host wrote, each range as it was written: all that can be read back.
std::map<char*, size_t> written;

char* device_base;  // what OneFlow sees
char* host_base;    // the same bytes, accessible
thread_local int thread_device = 0;

// Addresses for each device: more than its memory, because released blocks are not joined.
size_t bytes_per_device() {
  return 2 * settings().memory_bytes + (size_t(1) << 30);
}

size_t all_bytes() {
  return settings().devices * bytes_per_device();
}

[[noreturn]] void die(const char* what) {
  perror(what);
  abort();
}

void map_memory() {
  static std::once_flag once;
  std::call_once(once, [] {
    int file = memfd_create("fakecuda", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, all_bytes()) != 0) die("fakecuda: memory file");
    int flags = MAP_SHARED | MAP_NORESERVE;
    void* host = mmap(nullptr, all_bytes(), PROT_READ | PROT_WRITE, flags, file, 0);
    void* device = mmap(nullptr, all_bytes(), PROT_NONE, flags, file, 0);
    if (host == MAP_FAILED || device == MAP_FAILED) die("fakecuda: map of the memory file");
    host_base = static_cast<char*>(host);
    for (int i = 0; i < settings().devices; i++) {
      devices[i].unused = static_cast<char*>(device) + i * bytes_per_device();
    }
    device_base = static_cast<char*>(device);
  });
}

char* accessible(const void* pointer) {
  char* address = static_cast<char*>(const_cast<void*>(pointer));
  return device_of(pointer) < 0 ? address : host_base + (address - device_base);
}

bool is_allocated(const void* pointer, size_t size) {
  char* address = static_cast<char*>(const_cast<void*>(pointer));
  auto next = allocations.upper_bound(address);
  if (next == allocations.begin()) return false;
  auto [start, length] = *std::prev(next);
  return address + size <= start + length;
}

void forget_written(char* start, size_t size) {
  auto range = written.upper_bound(start);
  if (range != written.begin() && std::prev(range)->first + std::prev(range)->second > start) {
    range = std::prev(range);
  }
  while (range != written.end() && range->first < start + size) range = written.erase(range);
}

void remember_written(char* start, size_t size) {
  forget_written(start, size);
  written[start] = size;
}

bool was_written(const void* pointer, size_t size) {
  auto range = written.find(static_cast<char*>(const_cast<void*>(pointer)));
  return range != written.end() && range->second == size;
}

// Of the same device only: a released block that is not much larger, or addresses never used.
char* take_block(Device& device, size_t& size) {
  auto block = device.released.lower_bound(size);
  if (block != device.released.end() && block->first <= size + size / 8) {
    char* start = block->second;
    size = block->first;
    device.released.erase(block);
    return start;
  }
  char* end = device_base + (&device - devices + 1) * bytes_per_device();
  if (device.unused + size > end) return nullptr;
  char* start = device.unused;
  device.unused += size;
  return start;
}

const char* side(const void* pointer) {
  return device_of(pointer) < 0 ? "H" : "D";
}

bool check_copy(const void* to, const void* from, size_t size, int kind) {
  int to_device = device_of(to);
  int from_device = device_of(from);
  bool host_to_device = to_device >= 0 && from_device < 0;
  bool device_to_host = to_device < 0 && from_device >= 0;
  if (kind == cudaMemcpyHostToDevice && !host_to_device) {
    report_error("copy of %zu bytes, host to device, goes from %s to %s", size, side(from),
                 side(to));
    return false;
  }
  if (kind == cudaMemcpyDeviceToHost && !device_to_host) {
    report_error("copy of %zu bytes, device to host, goes from %s to %s", size, side(from),
                 side(to));
    return false;
  }
  if (kind == cudaMemcpyDeviceToDevice && (to_device < 0 || from_device < 0)) {
    report_error("copy of %zu bytes on a device goes from %s to %s", size, side(from), side(to));
    return false;
  }
  bool good = true;
  if (to_device >= 0) good &= check_operand("copy", "target", to, size, current_device());
  if (from_device >= 0) good &= check_operand("copy", "source", from, size, current_device());
  return good;
}

}  // namespace

int current_device() {
  return thread_device;
}

void set_current_device(int device) {
  thread_device = device;
}

void use_context(const char* function) {
  std::lock_guard<std::mutex> lock(guard);
  Device& device = devices[thread_device];
  if (!device.context) log_line("CONTEXT device %d by %s", thread_device, function);
  device.context = true;
}

bool has_context(int device) {
  std::lock_guard<std::mutex> lock(guard);
  return devices[device].context;
}

int device_of(const void* pointer) {
  const char* address = static_cast<const char*>(pointer);
  if (!device_base || address < device_base || address >= device_base + all_bytes()) return -1;
  return (address - device_base) / bytes_per_device();
}

cudaError_t allocate(void** pointer, size_t size) {
  map_memory();
  *pointer = nullptr;
  if (size == 0) return cudaSuccess;
  std::lock_guard<std::mutex> lock(guard);
  Device& device = devices[thread_device];
  size_t block_size = (size + kAlignment - 1) / kAlignment * kAlignment;
  char* block = nullptr;
  if (device.used + block_size <= settings().memory_bytes) block = take_block(device, block_size);
  if (!block) {
    log_line("OOM device %d wanted %zu used %zu", thread_device, size, device.used);
    return cudaErrorMemoryAllocation;
  }
  allocations[block] = block_size;
  device.used += block_size;
  device.peak = std::max(device.peak, device.used);
  log_line("MALLOC device %d %zu used %zu", thread_device, size, device.used);
  *pointer = block;
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  if (!pointer) return cudaSuccess;
  std::lock_guard<std::mutex> lock(guard);
  char* start = static_cast<char*>(pointer);
  auto found = allocations.find(start);
  if (found == allocations.end()) {
    report_error("cudaFree of %p, which is not allocated", pointer);
    return cudaErrorInvalidValue;
  }
  size_t size = found->second;
  int owner = device_of(pointer);
  Device& device = devices[owner];
  device.used -= size;
  log_line("FREE device %d %zu used %zu", owner, size, device.used);
  forget_written(start, size);
  // MADV_REMOVE takes whole pages; what shares a page with another block stays.
  if (size >= kGiveBackBytes) {
    size_t page = sysconf(_SC_PAGESIZE);
    char* first = host_base + ((start - device_base) + page - 1) / page * page;
    char* last = host_base + (start + size - device_base) / page * page;
    madvise(first, last - first, MADV_REMOVE);
  }
  device.released.insert({size, start});
  allocations.erase(found);
  return cudaSuccess;
}

size_t used_bytes(int device) {
  std::lock_guard<std::mutex> lock(guard);
  return devices[device].used;
}

cudaError_t copy(void* to, const void* from, size_t size, int kind) {
  if (size == 0) return cudaSuccess;
  if (!check_copy(to, from, size, kind)) return cudaErrorInvalidValue;
  log_line("COPY %s%s %zu device %d", side(from), side(to), size, current_device());
  bool from_host = device_of(from) < 0;
  bool to_host = device_of(to) < 0;
  std::lock_guard<std::mutex> lock(guard);
  bool known = from_host || was_written(from, size);
  if (!to_host) {
    char* target = static_cast<char*>(to);
    known ? remember_written(target, size) : forget_written(target, size);
  }
  if (known) {
    memmove(accessible(to), accessible(from), size);
  } else if (to_host) {
    memset(to, settings().fill, size);
  }
  return cudaSuccess;
}

cudaError_t fill(void* to, int value, size_t size) {
  if (size == 0) return cudaSuccess;
  if (!check_operand("cudaMemset", "target", to, size, current_device())) {
    return cudaErrorInvalidValue;
  }
  std::lock_guard<std::mutex> lock(guard);
  remember_written(static_cast<char*>(to), size);
  memset(accessible(to), value, size);
  return cudaSuccess;
}

bool check_operand(const char* function, const char* operand, const void* pointer, size_t size,
                   int device) {
  int owner = device_of(pointer);
  if (owner < 0) {
    report_error("%s: %s is %p, not device memory", function, operand, pointer);
    return false;
  }
  std::unique_lock<std::mutex> lock(guard);
  bool allocated = is_allocated(pointer, size);
  lock.unlock();
  if (!allocated) {
    report_error("%s: %s, %zu bytes at %p, is not inside a live allocation of device %d", function,
                 operand, size, pointer, owner);
    return false;
  }
  if (owner != device) {
    report_error("%s: two devices mixed: %s is on device %d, the call on device %d", function,
                 operand, owner, device);
    return false;
  }
  return true;
}

int device_of_object(const void* object) {
  return object ? static_cast<const DeviceObject*>(object)->device : current_device();
}

bool check_object(const char* function, const char* what, const void* object) {
  int device = device_of_object(object);
  if (device == current_device()) return true;
  report_error("%s: two devices mixed: the %s is on device %d, the current one is %d", function,
               what, device, current_device());
  return false;
}

EXPORT size_t fakecuda_used(int device) {
  return used_bytes(device);
}

EXPORT size_t fakecuda_peak(int device) {
  std::lock_guard<std::mutex> lock(guard);
  return devices[device].peak;
}
