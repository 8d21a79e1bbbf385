// The few functions of CUDA's driver that ask about devices. The library has the name of the driver's
// (see LINK in fake.py), so whoever loads that gets this. None of them makes a context.

#include <cstdio>

#include "settings.h"

namespace {

constexpr int kSuccess = 0;
constexpr int kInvalidDevice = 101;
constexpr int kNotSupported = 801;
constexpr int kCapabilityMajor = 75;
constexpr int kCapabilityMinor = 76;

bool is_device(int device) {
  return device >= 0 && device < settings().devices;
}

}  // namespace

EXPORT int cuInit(unsigned) {
  return kSuccess;
}

EXPORT int cuDeviceGetCount(int* count) {
  *count = settings().devices;
  return kSuccess;
}

EXPORT int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return is_device(ordinal) ? kSuccess : kInvalidDevice;
}

EXPORT int cuDeviceGetName(char* name, int size, int device) {
  if (!is_device(device)) return kInvalidDevice;
  snprintf(name, size, "Fake CUDA device sm_%d (computes nothing)", settings().capability);
  return kSuccess;
}

EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int device) {
  if (!is_device(device)) return kInvalidDevice;
  *bytes = settings().memory_bytes;
  return kSuccess;
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (!is_device(device)) return kInvalidDevice;
  if (attribute == kCapabilityMajor) {
    *value = settings().capability / 10;
  } else if (attribute == kCapabilityMinor) {
    *value = settings().capability % 10;
  } else {
    return kNotSupported;
  }
  return kSuccess;
}
