// Device memory, streams' and handles' devices, and the checks of what is passed to a library.
#pragma once

#include "cuda_types.h"

// CUDA keeps the current device for each thread.
int current_device();
void set_current_device(int device);

// What needs a context on a real device says so here; the first time is logged.
void use_context(const char* function);
bool has_context(int device);

// The device whose memory a pointer is in, or -1.
int device_of(const void* pointer);

cudaError_t allocate(void** pointer, size_t size);
cudaError_t release(void* pointer);
size_t used_bytes(int device);

// What the host wrote into device memory is really there. Whatever else the host reads from there
// would have been computed by a kernel, and reads as FAKECUDA_FILL (0): the memory may have held
// something else before, and its bits could be a NaN, or a count of hits above the batch.
cudaError_t copy(void* to, const void* from, size_t size, int kind);
cudaError_t fill(void* to, int value, size_t size);

// Whether [pointer, pointer + size) may be used by `function` on `device`; reports if not.
bool check_operand(const char* function, const char* operand, const void* pointer, size_t size,
                   int device);

// A stream, an event, or a handle of cuDNN, cuBLAS or cuRAND: all that matters is its device.
struct DeviceObject {
  int device;
};
// The default stream is null and belongs to the current device.
int device_of_object(const void* object);
// Whether a handle or stream may be used now: its device has to be the current one.
bool check_object(const char* function, const char* what, const void* object);
