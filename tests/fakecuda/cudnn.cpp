// cuDNN. Descriptors are the real library's, which needs no device to make them. It is also asked
// which output a convolution or a pooling would have, and that is compared with the one given.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <string>

#include "memory.h"
#include "settings.h"

namespace {

constexpr int kSuccess = 0;
constexpr int kBadParam = 3;
constexpr int kNotSupported = 9;

constexpr int kHalf = 2;                   // cudnnDataType_t
constexpr int kSpatialPersistent = 2;      // cudnnBatchNormMode_t
constexpr int kMostDimensions = 8;         // that OneFlow uses
constexpr const char* kOps = "libcudnn_ops_infer.so.8";
constexpr const char* kConvolutions = "libcudnn_cnn_infer.so.8";

template <typename Function>
Function* real_function(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  void* found = handle ? dlsym(handle, name) : nullptr;
  if (!found) log_line("MISSING %s in the real %s", name, library);
  return reinterpret_cast<Function*>(found);
}

struct Tensor {
  int type = -1;
  int dimensions = 0;
  int size[kMostDimensions] = {};
  int stride[kMostDimensions] = {};

  // cuDNN's descriptors hold sizes as (N, C, H, W) in either layout; the strides tell.
  bool is_channels_last() const {
    return dimensions == 4 && stride[1] == 1 && size[1] > 1;
  }

  size_t elements() const {
    size_t product = 1;
    for (int i = 0; i < dimensions; i++) product *= size[i];
    return product;
  }

  size_t bytes() const {
    const size_t of_element[] = {4, 8, 2, 1, 4};
    return type >= 0 && type < 5 ? elements() * of_element[type] : 0;
  }

  std::string text() const {
    const char* types[] = {"f32", "f64", "f16", "i8", "i32"};
    std::string found = type >= 0 && type < 5 ? types[type] : "?";
    for (int i = 0; i < dimensions; i++) found += (i ? "," : "[") + std::to_string(size[i]);
    return found + "]" + (is_channels_last() ? "nhwc" : "nchw");
  }
};

bool read_tensor(void* descriptor, Tensor* tensor) {
  static auto real =
      real_function<int(void*, int, int*, int*, int*, int*)>(kOps, "cudnnGetTensorNdDescriptor");
  return real && real(descriptor, kMostDimensions, &tensor->type, &tensor->dimensions,
                      tensor->size, tensor->stride) == kSuccess;
}

struct Operand {
  const char* name;
  const void* pointer;
  size_t bytes;
};

// All on the device that the handle is of. Of operands without a descriptor only the first byte is
// looked at.
bool check_operands(const char* function, void* handle, std::initializer_list<Operand> operands) {
  bool good = check_object(function, "handle", handle);
  for (const Operand& operand : operands) {
    size_t size = operand.bytes ? operand.bytes : 1;
    good &= check_operand(function, operand.name, operand.pointer, size, current_device());
  }
  return good;
}

size_t bytes_of(void* descriptor) {
  Tensor tensor;
  return read_tensor(descriptor, &tensor) ? tensor.bytes() : 0;
}

int status(bool good) {
  return good ? kSuccess : kBadParam;
}

// x * w = y, forward or backward.
bool check_convolution(const char* what, void* convolution, void* x, void* w, void* y) {
  static auto real = real_function<int(void*, void*, void*, int, int*)>(
      kConvolutions, "cudnnGetConvolutionNdForwardOutputDim");
  Tensor x_tensor;
  Tensor y_tensor;
  if (!real || !read_tensor(x, &x_tensor) || !read_tensor(y, &y_tensor)) {
    report_error("%s: descriptors that cannot be read", what);
    return false;
  }
  log_line("CONV %s x %s y %s", what, x_tensor.text().c_str(), y_tensor.text().c_str());
  int output[kMostDimensions] = {};
  int found = real(convolution, x, w, y_tensor.dimensions, output);
  bool same = memcmp(output, y_tensor.size, y_tensor.dimensions * sizeof(int)) == 0;
  if (found == kSuccess && same) return true;
  report_error("%s: status %d, output would be %d,%d,%d,%d, x %s y %s", what, found, output[0],
               output[1], output[2], output[3], x_tensor.text().c_str(), y_tensor.text().c_str());
  return false;
}

bool check_pooling(const char* what, void* pooling, void* x, void* y) {
  static auto real = real_function<int(void*, void*, int, int*)>(
      kOps, "cudnnGetPoolingNdForwardOutputDim");
  Tensor x_tensor;
  Tensor y_tensor;
  if (!real || !read_tensor(x, &x_tensor) || !read_tensor(y, &y_tensor)) {
    report_error("%s: descriptors that cannot be read", what);
    return false;
  }
  log_line("POOL %s x %s y %s", what, x_tensor.text().c_str(), y_tensor.text().c_str());
  int output[kMostDimensions] = {};
  int found = real(pooling, x, y_tensor.dimensions, output);
  bool same = memcmp(output, y_tensor.size, y_tensor.dimensions * sizeof(int)) == 0;
  if (found == kSuccess && same) return true;
  report_error("%s: status %d, x %s y %s", what, found, x_tensor.text().c_str(),
               y_tensor.text().c_str());
  return false;
}

struct AlgorithmPerformance {  // cudnnConvolution{Fwd,BwdData,BwdFilter}AlgoPerf_t
  int algorithm;
  int status;
  float milliseconds;
  size_t workspace_bytes;
  int deterministic;
  int math_type;
  int reserved[3];
};
static_assert(sizeof(AlgorithmPerformance) == 48);

// One algorithm, whatever was asked for.
int answer(bool good, int wanted, int* returned, AlgorithmPerformance* performance) {
  if (!good || wanted < 1) return kBadParam;
  *returned = 1;
  *performance = {};
  performance->algorithm = 1;
  performance->milliseconds = 1;
  performance->workspace_bytes = settings().conv_workspace_bytes;
  performance->deterministic = 1;
  performance->math_type = 1;  // tensor cores
  return kSuccess;
}

int not_expected(const char* function) {
  log_line("MISSING %s", function);
  return kNotSupported;
}

// The fused kernels exist for half precision, channels last, and channels in fours only.
bool check_fused(const char* what, int mode, int operations, const Tensor& x) {
  if (operations == 0) return true;
  bool good = x.type == kHalf && x.dimensions == 4 && x.stride[1] == 1;
  good &= mode != kSpatialPersistent || x.size[1] % 4 == 0;
  if (!good) {
    report_error("%s: fused operations need f16, NHWC, channels in fours: x %s", what,
                 x.text().c_str());
  }
  return good;
}

}  // namespace

EXPORT int cudnnCreate(void** handle) {
  use_context("cudnnCreate");
  *handle = new DeviceObject{current_device()};
  return kSuccess;
}

EXPORT int cudnnDestroy(void* handle) {
  delete static_cast<DeviceObject*>(handle);
  return kSuccess;
}

EXPORT int cudnnSetStream(void* handle, void* stream) {
  int handle_device = device_of_object(handle);
  int stream_device = device_of_object(stream);
  if (handle_device == stream_device) return kSuccess;
  report_error("cudnnSetStream: two devices mixed: handle on device %d, stream on device %d",
               handle_device, stream_device);
  return kBadParam;
}

// ---- choice of algorithms

EXPORT int cudnnGetConvolutionForwardAlgorithmMaxCount(void*, int* count) {
  *count = 8;
  return kSuccess;
}

EXPORT int cudnnGetConvolutionBackwardDataAlgorithmMaxCount(void*, int* count) {
  *count = 6;
  return kSuccess;
}

EXPORT int cudnnGetConvolutionBackwardFilterAlgorithmMaxCount(void*, int* count) {
  *count = 7;
  return kSuccess;
}

EXPORT int cudnnGetConvolutionForwardAlgorithm_v7(void*, void* x, void* w, void* convolution,
                                                  void* y, int wanted, int* returned,
                                                  AlgorithmPerformance* performance) {
  bool good = check_convolution("fwd heuristic", convolution, x, w, y);
  return answer(good, wanted, returned, performance);
}

EXPORT int cudnnGetConvolutionBackwardDataAlgorithm_v7(void*, void* w, void* dy, void* convolution,
                                                       void* dx, int wanted, int* returned,
                                                       AlgorithmPerformance* performance) {
  bool good = check_convolution("dgrad heuristic", convolution, dx, w, dy);
  return answer(good, wanted, returned, performance);
}

EXPORT int cudnnGetConvolutionBackwardFilterAlgorithm_v7(void*, void* x, void* dy,
                                                         void* convolution, void* dw, int wanted,
                                                         int* returned,
                                                         AlgorithmPerformance* performance) {
  bool good = check_convolution("wgrad heuristic", convolution, x, dw, dy);
  return answer(good, wanted, returned, performance);
}

EXPORT int cudnnFindConvolutionForwardAlgorithmEx(void* handle, void* x, const void* x_data,
                                                  void* w, const void* w_data, void* convolution,
                                                  void* y, void* y_data, int wanted, int* returned,
                                                  AlgorithmPerformance* performance,
                                                  void* workspace, size_t workspace_bytes) {
  log_line("FIND workspace %zu", workspace_bytes);
  bool good = check_convolution("fwd find", convolution, x, w, y);
  good &= check_operands("cudnnFindConvolutionForwardAlgorithmEx", handle,
                         {{"x", x_data, bytes_of(x)},
                          {"w", w_data, 0},
                          {"y", y_data, bytes_of(y)},
                          {"workspace", workspace, workspace_bytes}});
  return answer(good, wanted, returned, performance);
}

EXPORT int cudnnFindConvolutionBackwardDataAlgorithmEx(
    void* handle, void* w, const void* w_data, void* dy, const void* dy_data, void* convolution,
    void* dx, void* dx_data, int wanted, int* returned, AlgorithmPerformance* performance,
    void* workspace, size_t workspace_bytes) {
  log_line("FIND workspace %zu", workspace_bytes);
  bool good = check_convolution("dgrad find", convolution, dx, w, dy);
  good &= check_operands("cudnnFindConvolutionBackwardDataAlgorithmEx", handle,
                         {{"w", w_data, 0},
                          {"dy", dy_data, bytes_of(dy)},
                          {"dx", dx_data, bytes_of(dx)},
                          {"workspace", workspace, workspace_bytes}});
  return answer(good, wanted, returned, performance);
}

EXPORT int cudnnFindConvolutionBackwardFilterAlgorithmEx(
    void* handle, void* x, const void* x_data, void* dy, const void* dy_data, void* convolution,
    void* dw, void* dw_data, int wanted, int* returned, AlgorithmPerformance* performance,
    void* workspace, size_t workspace_bytes) {
  log_line("FIND workspace %zu", workspace_bytes);
  bool good = check_convolution("wgrad find", convolution, x, dw, dy);
  good &= check_operands("cudnnFindConvolutionBackwardFilterAlgorithmEx", handle,
                         {{"x", x_data, bytes_of(x)},
                          {"dy", dy_data, bytes_of(dy)},
                          {"dw", dw_data, 0},
                          {"workspace", workspace, workspace_bytes}});
  return answer(good, wanted, returned, performance);
}

EXPORT int cudnnGetConvolutionForwardWorkspaceSize(void*, void* x, void* w, void* convolution,
                                                   void* y, int, size_t* size) {
  *size = settings().conv_workspace_bytes;
  return status(check_convolution("fwd workspace", convolution, x, w, y));
}

EXPORT int cudnnGetConvolutionBackwardDataWorkspaceSize(void*, void* w, void* dy,
                                                        void* convolution, void* dx, int,
                                                        size_t* size) {
  *size = settings().conv_workspace_bytes;
  return status(check_convolution("dgrad workspace", convolution, dx, w, dy));
}

EXPORT int cudnnGetConvolutionBackwardFilterWorkspaceSize(void*, void* x, void* dy,
                                                          void* convolution, void* dw, int,
                                                          size_t* size) {
  *size = settings().conv_workspace_bytes;
  return status(check_convolution("wgrad workspace", convolution, x, dw, dy));
}

// ---- convolutions

EXPORT int cudnnConvolutionForward(void* handle, const void*, void* x, const void* x_data, void* w,
                                   const void* w_data, void* convolution, int, void*, size_t,
                                   const void*, void* y, void* y_data) {
  bool good = check_convolution("fwd", convolution, x, w, y);
  good &= check_operands("cudnnConvolutionForward", handle,
                         {{"x", x_data, bytes_of(x)},
                          {"w", w_data, 0},
                          {"y", y_data, bytes_of(y)}});
  return status(good);
}

EXPORT int cudnnConvolutionBackwardData(void* handle, const void*, void* w, const void* w_data,
                                        void* dy, const void* dy_data, void* convolution, int,
                                        void*, size_t, const void*, void* dx, void* dx_data) {
  bool good = check_convolution("dgrad", convolution, dx, w, dy);
  good &= check_operands(
      "cudnnConvolutionBackwardData", handle,
      {{"w", w_data, 0}, {"dy", dy_data, bytes_of(dy)}, {"dx", dx_data, bytes_of(dx)}});
  return status(good);
}

EXPORT int cudnnConvolutionBackwardFilter(void* handle, const void*, void* x, const void* x_data,
                                          void* dy, const void* dy_data, void* convolution, int,
                                          void*, size_t, const void*, void* dw, void* dw_data) {
  bool good = check_convolution("wgrad", convolution, x, dw, dy);
  good &= check_operands(
      "cudnnConvolutionBackwardFilter", handle,
      {{"x", x_data, bytes_of(x)}, {"dy", dy_data, bytes_of(dy)}, {"dw", dw_data, 0}});
  return status(good);
}

EXPORT int cudnnConvolutionBackwardBias(void* handle, const void*, void* dy, const void* dy_data,
                                        const void*, void* db, void* db_data) {
  return status(check_operands("cudnnConvolutionBackwardBias", handle,
                               {{"dy", dy_data, bytes_of(dy)}, {"db", db_data, bytes_of(db)}}));
}

// ---- batch norm

EXPORT int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*,
                                                                    void*, void*, void*,
                                                                    size_t* size) {
  *size = 0;
  return kSuccess;
}

EXPORT int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*,
                                                             void*, void*, void*, void*,
                                                             size_t* size) {
  *size = 0;
  return kSuccess;
}

// A bit for each element, for the backward pass of the ReLU.
EXPORT int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int operations, void*,
                                                                void* x, size_t* size) {
  Tensor tensor;
  bool fused = operations != 0 && read_tensor(x, &tensor);
  *size = fused ? (tensor.elements() + 7) / 8 : 0;
  return kSuccess;
}

EXPORT int cudnnBatchNormalizationForwardTraining(void* handle, int mode, const void*, const void*,
                                                  void* x, const void* x_data, void* y,
                                                  void* y_data, void*, const void* scale,
                                                  const void* bias, double, void*, void*, double,
                                                  void* mean, void* inverse) {
  Tensor tensor;
  read_tensor(x, &tensor);
  log_line("BN mode %d ops 0 x %s", mode, tensor.text().c_str());
  return status(check_operands("cudnnBatchNormalizationForwardTraining", handle,
                               {{"x", x_data, tensor.bytes()},
                                {"y", y_data, bytes_of(y)},
                                {"scale", scale, 0},
                                {"bias", bias, 0},
                                {"mean", mean, 0},
                                {"inverse variance", inverse, 0}}));
}

EXPORT int cudnnBatchNormalizationForwardTrainingEx(
    void* handle, int mode, int operations, const void*, const void*, void* x, const void* x_data,
    void*, const void*, void* y, void* y_data, void*, const void* scale, const void* bias, double,
    void*, void*, double, void* mean, void* inverse, void*, void*, size_t, void* reserve,
    size_t reserve_bytes) {
  const char* function = "cudnnBatchNormalizationForwardTrainingEx";
  Tensor tensor;
  read_tensor(x, &tensor);
  log_line("BN mode %d ops %d x %s", mode, operations, tensor.text().c_str());
  bool good = check_fused(function, mode, operations, tensor);
  good &= check_operands(function, handle,
                         {{"x", x_data, tensor.bytes()},
                          {"y", y_data, bytes_of(y)},
                          {"scale", scale, 0},
                          {"bias", bias, 0},
                          {"mean", mean, 0},
                          {"inverse variance", inverse, 0}});
  if (reserve_bytes) {
    good &= check_operands(function, handle, {{"reserve space", reserve, reserve_bytes}});
  }
  return status(good);
}

EXPORT int cudnnBatchNormalizationBackward(void* handle, int mode, const void*, const void*,
                                           const void*, const void*, void* x, const void* x_data,
                                           void* dy, const void* dy_data, void* dx, void* dx_data,
                                           void*, const void* scale, void* dscale, void* dbias,
                                           double, const void*, const void*) {
  Tensor tensor;
  read_tensor(x, &tensor);
  log_line("BN BACKWARD mode %d ops 0 x %s", mode, tensor.text().c_str());
  return status(check_operands("cudnnBatchNormalizationBackward", handle,
                               {{"x", x_data, tensor.bytes()},
                                {"dy", dy_data, bytes_of(dy)},
                                {"dx", dx_data, bytes_of(dx)},
                                {"scale", scale, 0},
                                {"dscale", dscale, 0},
                                {"dbias", dbias, 0}}));
}

EXPORT int cudnnBatchNormalizationBackwardEx(
    void* handle, int mode, int operations, const void*, const void*, const void*, const void*,
    void* x, const void* x_data, void*, const void*, void* dy, const void* dy_data, void*, void*,
    void* dx, void* dx_data, void*, const void* scale, const void*, void* dscale, void* dbias,
    double, const void*, const void*, void*, void*, size_t, void* reserve, size_t reserve_bytes) {
  const char* function = "cudnnBatchNormalizationBackwardEx";
  Tensor tensor;
  read_tensor(x, &tensor);
  log_line("BN BACKWARD mode %d ops %d x %s", mode, operations, tensor.text().c_str());
  bool good = check_fused(function, mode, operations, tensor);
  good &= check_operands(function, handle,
                         {{"x", x_data, tensor.bytes()},
                          {"dy", dy_data, bytes_of(dy)},
                          {"dx", dx_data, bytes_of(dx)},
                          {"scale", scale, 0},
                          {"dscale", dscale, 0},
                          {"dbias", dbias, 0}});
  if (reserve_bytes) {
    good &= check_operands(function, handle, {{"reserve space", reserve, reserve_bytes}});
  }
  return status(good);
}

EXPORT int cudnnBatchNormalizationForwardInference(void* handle, int mode, const void*,
                                                   const void*, void* x, const void* x_data,
                                                   void* y, void* y_data, void*, const void* scale,
                                                   const void* bias, const void* mean,
                                                   const void* variance, double) {
  Tensor tensor;
  read_tensor(x, &tensor);
  log_line("BN INFER mode %d x %s", mode, tensor.text().c_str());
  return status(check_operands("cudnnBatchNormalizationForwardInference", handle,
                               {{"x", x_data, tensor.bytes()},
                                {"y", y_data, bytes_of(y)},
                                {"scale", scale, 0},
                                {"bias", bias, 0},
                                {"mean", mean, 0},
                                {"variance", variance, 0}}));
}

// ---- the rest

EXPORT int cudnnPoolingForward(void* handle, void* pooling, const void*, void* x,
                               const void* x_data, const void*, void* y, void* y_data) {
  bool good = check_pooling("fwd", pooling, x, y);
  good &= check_operands("cudnnPoolingForward", handle,
                         {{"x", x_data, bytes_of(x)}, {"y", y_data, bytes_of(y)}});
  return status(good);
}

EXPORT int cudnnPoolingBackward(void* handle, void* pooling, const void*, void* y,
                                const void* y_data, void* dy, const void* dy_data, void* x,
                                const void* x_data, const void*, void* dx, void* dx_data) {
  bool good = check_pooling("bwd", pooling, x, y);
  good &= check_operands("cudnnPoolingBackward", handle,
                         {{"y", y_data, bytes_of(y)},
                          {"dy", dy_data, bytes_of(dy)},
                          {"x", x_data, bytes_of(x)},
                          {"dx", dx_data, bytes_of(dx)}});
  return status(good);
}

EXPORT int cudnnAddTensor(void* handle, const void*, void* a, const void* a_data, const void*,
                          void* c, void* c_data) {
  return status(check_operands("cudnnAddTensor", handle,
                               {{"a", a_data, bytes_of(a)}, {"c", c_data, bytes_of(c)}}));
}

// Operators that this project does not use.
EXPORT int cudnnSpatialTfSamplerForward() {
  return not_expected("cudnnSpatialTfSamplerForward");
}

EXPORT int cudnnSpatialTfSamplerBackward() {
  return not_expected("cudnnSpatialTfSamplerBackward");
}
