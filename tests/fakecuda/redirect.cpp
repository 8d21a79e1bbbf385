// The CUDA runtime is linked into liboneflow with local symbols, where no other library can take
// its place. So the first bytes of its functions are overwritten, in memory, with jumps to the
// functions here; fakecuda.py finds their addresses in the library's symbol table.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include "cuda_types.h"
#include "runtime.h"
#include "settings.h"

namespace {

// jmp *0(%rip), and the target behind it.
constexpr unsigned char kJump[] = {0xff, 0x25, 0, 0, 0, 0};
constexpr size_t kJumpBytes = sizeof kJump + sizeof(void*);
// mov name, %rdi; mov missing, %rax; jmp *%rax
constexpr size_t kStubBytes = 32;

cudaError_t missing(const char* name) {
  log_line("MISSING %s", name);
  fprintf(stderr, "fakecuda: %s is missing\n", name);
  return cudaErrorNotSupported;
}

void write_stub(unsigned char* stub, const char* name) {
  const unsigned char load_name[] = {0x48, 0xbf};
  const unsigned char load_function[] = {0x48, 0xb8};
  const unsigned char jump[] = {0xff, 0xe0};
  auto function = &missing;
  memcpy(stub, load_name, 2);
  memcpy(stub + 2, &name, 8);
  memcpy(stub + 10, load_function, 2);
  memcpy(stub + 12, &function, 8);
  memcpy(stub + 20, jump, 2);
}

}  // namespace

// Names of the functions that the library's symbol table has to hold, one a line.
EXPORT const char* fakecuda_names() {
  static const std::string names = [] {
    std::string text;
    for (const auto& entry : runtime_functions()) text += entry.first + "\n";
    return text;
  }();
  return names.c_str();
}

// The function of the runtime with this name, for tests that call it themselves.
EXPORT void* fakecuda_runtime(const char* name) {
  auto found = runtime_functions().find(name);
  return found == runtime_functions().end() ? nullptr : found->second;
}

// Redirects `count` functions, each `names[i]` at base + offsets[i]. One that is not here is
// redirected as well, to a line MISSING, for the real one would look for a driver.
EXPORT int fakecuda_redirect(unsigned char* base, const char** names, const size_t* offsets,
                             size_t count) {
  set_library_base(base);
  log_line("START devices %d memory %zu capability %d", settings().devices,
           settings().memory_bytes, settings().capability);
  size_t page = sysconf(_SC_PAGESIZE);
  size_t first = SIZE_MAX;
  size_t last = 0;
  for (size_t i = 0; i < count; i++) {
    first = offsets[i] < first ? offsets[i] : first;
    last = offsets[i] > last ? offsets[i] : last;
  }
  unsigned char* start = base + first / page * page;
  size_t size = (base + last + kJumpBytes - start + page - 1) / page * page;
  void* memory = mmap(nullptr, count * kStubBytes, PROT_READ | PROT_WRITE | PROT_EXEC,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(start, size, PROT_READ | PROT_WRITE | PROT_EXEC) != 0) {
    perror("fakecuda: making liboneflow writable");
    return -1;
  }
  unsigned char* stubs = static_cast<unsigned char*>(memory);
  for (size_t i = 0; i < count; i++) {
    void* target = fakecuda_runtime(names[i]);
    if (!target) {
      target = stubs + i * kStubBytes;
      write_stub(stubs + i * kStubBytes, strdup(names[i]));
    }
    memcpy(base + offsets[i], kJump, sizeof kJump);
    memcpy(base + offsets[i] + sizeof kJump, &target, sizeof target);
  }
  return mprotect(start, size, PROT_READ | PROT_EXEC);
}
