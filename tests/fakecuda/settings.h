// What the environment asks for, and the log.
#pragma once

#include <cstddef>

// In front of what OneFlow, or fakecuda.py, has to find by its name.
#define EXPORT extern "C" __attribute__((visibility("default")))

constexpr int kMaxDevices = 64;

struct Settings {
  int devices;                  // FAKECUDA_DEVICES
  size_t memory_bytes;          // FAKECUDA_MEMORY_MB, of each device
  int capability;               // FAKECUDA_CAPABILITY, 80 is 8.0
  size_t conv_workspace_bytes;  // FAKECUDA_CONV_WORKSPACE_MB, what each cuDNN algorithm asks for
  int fill;                     // FAKECUDA_FILL, the byte that stands for computed values
};
const Settings& settings();

// Appends a line to the file that FAKECUDA_LOG names. Nothing is buffered: a crash loses no line.
__attribute__((format(printf, 1, 2))) void log_line(const char* format, ...);

// Reports what would be wrong on a real device, as a line ERROR and on stderr.
__attribute__((format(printf, 1, 2))) void report_error(const char* format, ...);
