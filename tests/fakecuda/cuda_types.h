// The few types, values and layouts of CUDA 11.7 that OneFlow 0.9.0 and this library exchange.
// Names are CUDA's own, so that they can be looked up in its reference; only what is used is here.
#pragma once

#include <cstddef>

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;
constexpr cudaError_t cudaErrorMemoryAllocation = 2;
constexpr cudaError_t cudaErrorInvalidConfiguration = 9;
constexpr cudaError_t cudaErrorMissingConfiguration = 52;
constexpr cudaError_t cudaErrorNoDevice = 100;
constexpr cudaError_t cudaErrorInvalidDevice = 101;
constexpr cudaError_t cudaErrorNoKernelImageForDevice = 209;
constexpr cudaError_t cudaErrorInvalidResourceHandle = 400;
constexpr cudaError_t cudaErrorNotSupported = 801;

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};

constexpr int cudaMemoryTypeUnregistered = 0;
constexpr int cudaMemoryTypeDevice = 2;

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxBlockDimX = 2,
  cudaDevAttrMaxBlockDimY = 3,
  cudaDevAttrMaxBlockDimZ = 4,
  cudaDevAttrMaxGridDimX = 5,
  cudaDevAttrMaxGridDimY = 6,
  cudaDevAttrMaxGridDimZ = 7,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMaxRegistersPerBlock = 12,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMemoryPoolsSupported = 115,
};

struct dim3 {
  unsigned x, y, z;
};

// Fields that nothing here sets are the gaps.
struct cudaDeviceProp {
  char name[256];
  char gap1[32];
  size_t totalGlobalMem;
  size_t sharedMemPerBlock;
  int regsPerBlock;
  int warpSize;
  size_t memPitch;
  int maxThreadsPerBlock;
  int maxThreadsDim[3];
  int maxGridSize[3];
  int clockRate;  // kHz
  size_t totalConstMem;
  int major;
  int minor;
  size_t textureAlignment;
  char gap2[12];
  int multiProcessorCount;
  char gap3[8];
  int canMapHostMemory;
  char gap4[172];
  int concurrentKernels;
  int ECCEnabled;
  int pciBusID;
  int pciDeviceID;
  char gap5[8];
  int asyncEngineCount;
  int unifiedAddressing;
  int memoryClockRate;  // kHz
  int memoryBusWidth;   // bits
  int l2CacheSize;
  char gap6[4];
  int maxThreadsPerMultiProcessor;
  int streamPrioritiesSupported;
  char gap7[8];
  size_t sharedMemPerMultiprocessor;
  int regsPerMultiprocessor;
  int managedMemory;
  char gap8[24];
  int computePreemptionSupported;
  char gap9[4];
  int cooperativeLaunch;
  char gap10[4];
  size_t sharedMemPerBlockOptin;
  char gap11[8];
  int maxBlocksPerMultiProcessor;
  char gap12[12];
};
static_assert(sizeof(cudaDeviceProp) == 728);
static_assert(offsetof(cudaDeviceProp, totalGlobalMem) == 288);
static_assert(offsetof(cudaDeviceProp, clockRate) == 348);
static_assert(offsetof(cudaDeviceProp, major) == 360);
static_assert(offsetof(cudaDeviceProp, multiProcessorCount) == 388);
static_assert(offsetof(cudaDeviceProp, canMapHostMemory) == 400);
static_assert(offsetof(cudaDeviceProp, concurrentKernels) == 576);
static_assert(offsetof(cudaDeviceProp, asyncEngineCount) == 600);
static_assert(offsetof(cudaDeviceProp, maxThreadsPerMultiProcessor) == 624);
static_assert(offsetof(cudaDeviceProp, sharedMemPerMultiprocessor) == 640);
static_assert(offsetof(cudaDeviceProp, computePreemptionSupported) == 680);
static_assert(offsetof(cudaDeviceProp, cooperativeLaunch) == 688);
static_assert(offsetof(cudaDeviceProp, sharedMemPerBlockOptin) == 696);
static_assert(offsetof(cudaDeviceProp, maxBlocksPerMultiProcessor) == 712);

struct cudaFuncAttributes {
  char gap1[24];
  int maxThreadsPerBlock;
  int numRegs;
  char gap2[24];
};
static_assert(sizeof(cudaFuncAttributes) == 56);

struct cudaPointerAttributes {
  int type;
  int device;
  void* devicePointer;
  void* hostPointer;
};
static_assert(sizeof(cudaPointerAttributes) == 24);
