// The functions of the CUDA runtime that this library has, by name.
#pragma once

#include <string>
#include <unordered_map>

const std::unordered_map<std::string, void*>& runtime_functions();

// Where liboneflow was loaded, for the addresses of kernels in the log.
void set_library_base(const void* base);
