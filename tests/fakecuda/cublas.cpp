// cuBLAS. The descriptors of cuBLASLt are the real library's, which needs no device to make them.
#include <cstring>

#include "memory.h"
#include "settings.h"

namespace {

constexpr int kSuccess = 0;
constexpr int kInvalidValue = 7;

// Bytes of an element, by cudaDataType.
size_t element_bytes(int type) {
  switch (type) {
    case 0:  // real, 32 bits
      return 4;
    case 1:  // real, 64 bits
      return 8;
    case 2:  // real, 16 bits
      return 2;
    default:
      return 1;
  }
}

// What is inside the leading dimension, column by column: rows x columns.
size_t matrix_bytes(int rows, int columns, int leading, int type) {
  return (size_t(leading) * (columns - 1) + rows) * element_bytes(type);
}

int create_handle(void** handle) {
  use_context("cublasCreate");
  *handle = new DeviceObject{current_device()};
  return kSuccess;
}

int destroy_handle(void* handle) {
  delete static_cast<DeviceObject*>(handle);
  return kSuccess;
}

bool check_matrix(const char* function, const char* name, const void* matrix, bool transposed,
                  int rows, int columns, int leading, int type) {
  if (transposed) {
    int swapped = rows;
    rows = columns;
    columns = swapped;
  }
  if (leading < rows) {
    report_error("%s: leading dimension of %s is %d, with %d rows", function, name, leading, rows);
    return false;
  }
  size_t size = matrix_bytes(rows, columns, leading, type);
  return check_operand(function, name, matrix, size, current_device());
}

bool check_gemm(const char* function, void* handle, int transpose_a, int transpose_b, int m, int n,
                int k, const void* a, int a_type, int lda, const void* b, int b_type, int ldb,
                void* c, int c_type, int ldc) {
  log_line("GEMM %d %d %d type %d", m, n, k, c_type);
  bool good = check_object(function, "handle", handle);
  good &= check_matrix(function, "a", a, transpose_a, m, k, lda, a_type);
  good &= check_matrix(function, "b", b, transpose_b, k, n, ldb, b_type);
  good &= check_matrix(function, "c", c, false, m, n, ldc, c_type);
  return good;
}

int not_expected(const char* function) {
  log_line("MISSING %s", function);
  return kInvalidValue;
}

}  // namespace

EXPORT int cublasCreate_v2(void** handle) {
  return create_handle(handle);
}

EXPORT int cublasDestroy_v2(void* handle) {
  return destroy_handle(handle);
}

EXPORT int cublasLtCreate(void** handle) {
  return create_handle(handle);
}

EXPORT int cublasLtDestroy(void* handle) {
  return destroy_handle(handle);
}

EXPORT int cublasGetVersion_v2(void*, int* version) {
  *version = 111003;
  return kSuccess;
}

EXPORT int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return kSuccess;
}

EXPORT int cublasSetMathMode(void*, int) {
  return kSuccess;
}

EXPORT int cublasSetStream_v2(void* handle, void* stream) {
  int handle_device = device_of_object(handle);
  int stream_device = device_of_object(stream);
  if (handle_device == stream_device) return kSuccess;
  report_error("cublasSetStream: two devices mixed: handle on device %d, stream on device %d",
               handle_device, stream_device);
  return kInvalidValue;
}

EXPORT int cublasSetWorkspace_v2(void* handle, void* workspace, size_t size) {
  bool good = check_operand("cublasSetWorkspace", "workspace", workspace, size,
                            device_of_object(handle));
  return good ? kSuccess : kInvalidValue;
}

EXPORT int cublasGemmEx(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
                        const void*, const void* a, int a_type, int lda, const void* b, int b_type,
                        int ldb, const void*, void* c, int c_type, int ldc, int, int) {
  bool good = check_gemm("cublasGemmEx", handle, transpose_a, transpose_b, m, n, k, a, a_type, lda,
                         b, b_type, ldb, c, c_type, ldc);
  return good ? kSuccess : kInvalidValue;
}

EXPORT int cublasGemmStridedBatchedEx(void* handle, int transpose_a, int transpose_b, int m, int n,
                                      int k, const void*, const void* a, int a_type, int lda,
                                      long long, const void* b, int b_type, int ldb, long long,
                                      const void*, void* c, int c_type, int ldc, long long, int,
                                      int, int) {
  bool good = check_gemm("cublasGemmStridedBatchedEx", handle, transpose_a, transpose_b, m, n, k,
                         a, a_type, lda, b, b_type, ldb, c, c_type, ldc);
  return good ? kSuccess : kInvalidValue;
}

EXPORT int cublasLtMatmul(void* handle, void*, const void*, const void* a, void*, const void* b,
                          void*, const void*, const void* c, void*, void* d, void*, const void*,
                          void*, size_t, void* stream) {
  const char* function = "cublasLtMatmul";
  log_line("GEMM by cublasLtMatmul");
  bool good = check_object(function, "handle", handle);
  good &= check_object(function, "stream", stream);
  good &= check_operand(function, "a", a, 1, current_device());
  good &= check_operand(function, "b", b, 1, current_device());
  good &= check_operand(function, "c", c, 1, current_device());
  good &= check_operand(function, "d", d, 1, current_device());
  return good ? kSuccess : kInvalidValue;
}

EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int,
                                          void* results, int* count) {
  constexpr size_t kResultBytes = 96;
  memset(results, 0, kResultBytes);
  *count = 1;
  return kSuccess;
}

// Operators that this project does not use.
EXPORT int cublasGemmBatchedEx() {
  return not_expected("cublasGemmBatchedEx");
}

EXPORT int cublasSgetrfBatched() {
  return not_expected("cublasSgetrfBatched");
}

EXPORT int cublasSgetriBatched() {
  return not_expected("cublasSgetriBatched");
}

EXPORT int cublasDgetrfBatched() {
  return not_expected("cublasDgetrfBatched");
}

EXPORT int cublasDgetriBatched() {
  return not_expected("cublasDgetriBatched");
}
