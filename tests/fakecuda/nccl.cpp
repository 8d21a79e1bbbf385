// NCCL. Nothing is exchanged: each rank goes on with its own data. What can be compared between
// ranks is the order of the calls, so each is logged with its communicator. Communicators are
// numbered as they are made, and a line NCCL id tells which of two ranks belong together.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>

#include "memory.h"
#include "settings.h"

namespace {

constexpr int kSuccess = 0;
constexpr int kInvalidArgument = 4;

struct UniqueId {
  char text[128];
};

struct Communicator {
  DeviceObject object;
  int number;
  int rank;
  int size;
};

const char* reduction_name(int operation) {
  const char* names[] = {"sum", "prod", "max", "min", "avg"};
  return operation >= 0 && operation < 5 ? names[operation] : "unknown";
}

// Bytes of an element, by ncclDataType_t.
size_t element_bytes(int type) {
  const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return type >= 0 && type < 10 ? sizes[type] : 1;
}

bool check_call(const char* function, const Communicator* communicator, void* stream) {
  return check_object(function, "communicator", communicator) &
         check_object(function, "stream", stream);
}

bool check_buffer(const char* function, const char* name, const void* buffer, size_t size) {
  return check_operand(function, name, buffer, size, current_device());
}

// The part of the result that comes from this rank.
int keep_own(bool good, void* to, const void* from, size_t size) {
  if (!good) return kInvalidArgument;
  if (to == from) return kSuccess;
  return copy(to, from, size, cudaMemcpyDeviceToDevice) == 0 ? kSuccess : kInvalidArgument;
}

}  // namespace

EXPORT int ncclGetVersion(int* version) {
  *version = 21210;
  return kSuccess;
}

EXPORT const char* ncclGetErrorString(int) {
  return "an error of fakecuda's NCCL";
}

EXPORT int ncclGetUniqueId(UniqueId* id) {
  static std::atomic<int> made{0};
  char host[64] = "";
  gethostname(host, sizeof host - 1);
  memset(id, 0, sizeof *id);
  snprintf(id->text, sizeof id->text, "%s-%d-%d", host, static_cast<int>(getpid()), made++);
  return kSuccess;
}

EXPORT int ncclCommInitRank(Communicator** communicator, int size, UniqueId id, int rank) {
  static std::atomic<int> made{0};
  use_context("ncclCommInitRank");
  *communicator = new Communicator{{current_device()}, made++, rank, size};
  int number = (*communicator)->number;
  log_line("NCCL init comm %d rank %d of %d", number, rank, size);
  log_line("NCCL id comm %d is %.127s device %d", number, id.text, current_device());
  return kSuccess;
}

EXPORT int ncclCommDestroy(Communicator* communicator) {
  delete communicator;
  return kSuccess;
}

EXPORT int ncclGroupStart() {
  log_line("NCCL group start");
  return kSuccess;
}

EXPORT int ncclGroupEnd() {
  log_line("NCCL group end");
  return kSuccess;
}

EXPORT int ncclAllReduce(const void* send, void* receive, size_t count, int type, int operation,
                         Communicator* communicator, void* stream) {
  const char* function = "ncclAllReduce";
  log_line("NCCL comm %d allreduce %zu type %d op %s", communicator->number, count, type,
           reduction_name(operation));
  size_t size = count * element_bytes(type);
  bool good = check_call(function, communicator, stream);
  good &= check_buffer(function, "send buffer", send, size);
  good &= check_buffer(function, "receive buffer", receive, size);
  return keep_own(good, receive, send, size);
}

EXPORT int ncclReduce(const void* send, void* receive, size_t count, int type, int operation,
                      int root, Communicator* communicator, void* stream) {
  const char* function = "ncclReduce";
  log_line("NCCL comm %d reduce %zu type %d op %s root %d", communicator->number, count, type,
           reduction_name(operation), root);
  size_t size = count * element_bytes(type);
  bool good = check_call(function, communicator, stream);
  good &= check_buffer(function, "send buffer", send, size);
  if (root != communicator->rank) return good ? kSuccess : kInvalidArgument;
  good &= check_buffer(function, "receive buffer", receive, size);
  return keep_own(good, receive, send, size);
}

EXPORT int ncclBroadcast(const void* send, void* receive, size_t count, int type, int root,
                         Communicator* communicator, void* stream) {
  const char* function = "ncclBroadcast";
  log_line("NCCL comm %d broadcast %zu type %d root %d", communicator->number, count, type, root);
  size_t size = count * element_bytes(type);
  bool good = check_call(function, communicator, stream);
  good &= check_buffer(function, "receive buffer", receive, size);
  if (root != communicator->rank) return good ? kSuccess : kInvalidArgument;
  good &= check_buffer(function, "send buffer", send, size);
  return keep_own(good, receive, send, size);
}

EXPORT int ncclAllGather(const void* send, void* receive, size_t count, int type,
                         Communicator* communicator, void* stream) {
  const char* function = "ncclAllGather";
  log_line("NCCL comm %d allgather %zu type %d", communicator->number, count, type);
  size_t size = count * element_bytes(type);
  bool good = check_call(function, communicator, stream);
  good &= check_buffer(function, "send buffer", send, size);
  good &= check_buffer(function, "receive buffer", receive, size * communicator->size);
  return keep_own(good, static_cast<char*>(receive) + communicator->rank * size, send, size);
}

EXPORT int ncclReduceScatter(const void* send, void* receive, size_t count, int type,
                             int operation, Communicator* communicator, void* stream) {
  const char* function = "ncclReduceScatter";
  log_line("NCCL comm %d reducescatter %zu type %d op %s", communicator->number, count, type,
           reduction_name(operation));
  size_t size = count * element_bytes(type);
  bool good = check_call(function, communicator, stream);
  good &= check_buffer(function, "send buffer", send, size * communicator->size);
  good &= check_buffer(function, "receive buffer", receive, size);
  const char* own = static_cast<const char*>(send) + communicator->rank * size;
  return keep_own(good, receive, own, size);
}

EXPORT int ncclSend(const void* send, size_t count, int type, int peer, Communicator* communicator,
                    void* stream) {
  const char* function = "ncclSend";
  log_line("NCCL comm %d send %zu type %d peer %d", communicator->number, count, type, peer);
  bool good = check_call(function, communicator, stream);
  good &= check_buffer(function, "send buffer", send, count * element_bytes(type));
  return good ? kSuccess : kInvalidArgument;
}

EXPORT int ncclRecv(void* receive, size_t count, int type, int peer, Communicator* communicator,
                    void* stream) {
  const char* function = "ncclRecv";
  log_line("NCCL comm %d receive %zu type %d peer %d", communicator->number, count, type, peer);
  bool good = check_call(function, communicator, stream);
  good &= check_buffer(function, "receive buffer", receive, count * element_bytes(type));
  return good ? kSuccess : kInvalidArgument;
}
