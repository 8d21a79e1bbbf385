// cuRAND, and what the decoder of JPEGs on the device uses: nvJPEG and NPP.
#include <cstring>

#include "memory.h"
#include "settings.h"

namespace {

constexpr int kSuccess = 0;
constexpr int kBadJpeg = 3;
constexpr int kCurandBadValue = 103;
constexpr int kNppBadArgument = -5;

struct JpegSize {
  unsigned width = 0;
  unsigned height = 0;
};

unsigned big_endian_16(const unsigned char* bytes) {
  return bytes[0] << 8 | bytes[1];
}

// Reads the size out of the frame header, which is all of a JPEG that OneFlow asks for.
int read_size(const unsigned char* data, size_t size, JpegSize* found) {
  size_t i = 2;  // behind the start of the image
  while (i + 9 < size) {
    unsigned char marker = data[i + 1];
    if (data[i] != 0xff || marker == 0xff) {
      i++;
      continue;
    }
    bool is_table = marker == 0xc4 || marker == 0xc8 || marker == 0xcc;
    if (marker >= 0xc0 && marker <= 0xcf && !is_table) {
      found->height = big_endian_16(data + i + 5);
      found->width = big_endian_16(data + i + 7);
      return kSuccess;
    }
    i += 2 + big_endian_16(data + i + 2);
  }
  return kBadJpeg;
}

// Handles of nvJPEG; only that of a stream is looked into, and all have room for its size.
int make_handle(void** handle) {
  *handle = new JpegSize;
  return kSuccess;
}

int delete_handle(void* handle) {
  delete static_cast<JpegSize*>(handle);
  return kSuccess;
}

bool check_random(const char* function, void* generator, const void* output, size_t size) {
  bool good = check_object(function, "generator", generator);
  good &= check_operand(function, "output", output, size, current_device());
  return good;
}

}  // namespace

// ---- cuRAND

EXPORT int curandCreateGenerator(void** generator, int) {
  use_context("curandCreateGenerator");
  *generator = new DeviceObject{current_device()};
  return kSuccess;
}

EXPORT int curandDestroyGenerator(void* generator) {
  delete static_cast<DeviceObject*>(generator);
  return kSuccess;
}

EXPORT int curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) {
  return kSuccess;
}

EXPORT int curandSetStream(void*, void*) {
  return kSuccess;
}

EXPORT int curandGenerateUniform(void* generator, float* output, size_t count) {
  bool good = check_random("curandGenerateUniform", generator, output, count * sizeof *output);
  return good ? kSuccess : kCurandBadValue;
}

EXPORT int curandGenerateUniformDouble(void* generator, double* output, size_t count) {
  bool good =
      check_random("curandGenerateUniformDouble", generator, output, count * sizeof *output);
  return good ? kSuccess : kCurandBadValue;
}

// ---- NPP

EXPORT int nppiResize_8u_C3R_Ctx(const void* source, int, ...) {
  bool good = check_operand("nppiResize_8u_C3R_Ctx", "source", source, 1, current_device());
  return good ? kSuccess : kNppBadArgument;
}

// ---- nvJPEG

EXPORT int nvjpegCreateEx(int, void*, void*, unsigned, void** handle) {
  use_context("nvjpegCreateEx");
  return make_handle(handle);
}

EXPORT int nvjpegBufferDeviceCreate(void*, void*, void** buffer) {
  return make_handle(buffer);
}

EXPORT int nvjpegBufferPinnedCreate(void*, void*, void** buffer) {
  return make_handle(buffer);
}

EXPORT int nvjpegDecodeParamsCreate(void*, void** parameters) {
  return make_handle(parameters);
}

EXPORT int nvjpegDecoderCreate(void*, int, void** decoder) {
  return make_handle(decoder);
}

EXPORT int nvjpegDecoderStateCreate(void*, void*, void** state) {
  return make_handle(state);
}

EXPORT int nvjpegJpegStreamCreate(void*, void** stream) {
  return make_handle(stream);
}

EXPORT int nvjpegDestroy(void* handle) {
  return delete_handle(handle);
}

EXPORT int nvjpegBufferDeviceDestroy(void* buffer) {
  return delete_handle(buffer);
}

EXPORT int nvjpegBufferPinnedDestroy(void* buffer) {
  return delete_handle(buffer);
}

EXPORT int nvjpegDecodeParamsDestroy(void* parameters) {
  return delete_handle(parameters);
}

EXPORT int nvjpegDecoderDestroy(void* decoder) {
  return delete_handle(decoder);
}

EXPORT int nvjpegJpegStateDestroy(void* state) {
  return delete_handle(state);
}

EXPORT int nvjpegJpegStreamDestroy(void* stream) {
  return delete_handle(stream);
}

EXPORT int nvjpegDecodeParamsSetOutputFormat(void*, int) {
  return kSuccess;
}

EXPORT int nvjpegDecodeParamsSetROI(void*, int, int, int, int) {
  return kSuccess;
}

EXPORT int nvjpegStateAttachDeviceBuffer(void*, void*) {
  return kSuccess;
}

EXPORT int nvjpegStateAttachPinnedBuffer(void*, void*) {
  return kSuccess;
}

EXPORT int nvjpegDecoderJpegSupported(void*, void*, void*, int* answer) {
  *answer = 0;  // supported
  return kSuccess;
}

EXPORT int nvjpegGetImageInfo(void*, const unsigned char* data, size_t size, int* components,
                              int* subsampling, int* widths, int* heights) {
  JpegSize found;
  int status = read_size(data, size, &found);
  *components = 3;
  *subsampling = 2;  // 4:2:0
  widths[0] = found.width;
  heights[0] = found.height;
  return status;
}

EXPORT int nvjpegJpegStreamParse(void*, const unsigned char* data, size_t size, int, int,
                                 JpegSize* stream) {
  return read_size(data, size, stream);
}

EXPORT int nvjpegJpegStreamGetFrameDimensions(void* stream, unsigned* width, unsigned* height) {
  *width = static_cast<JpegSize*>(stream)->width;
  *height = static_cast<JpegSize*>(stream)->height;
  return kSuccess;
}

EXPORT int nvjpegDecodeJpegHost(void*, void*, void*, void*, void*) {
  return kSuccess;
}

EXPORT int nvjpegDecodeJpegTransferToDevice(void*, void*, void*, void*, void*) {
  return kSuccess;
}

EXPORT int nvjpegDecodeJpegDevice(void*, void*, void*, void*, void*) {
  return kSuccess;
}
