// NCCL: every call is checked, counted and logged; nothing is sent. NULLNCCL_FAIL names failures
// of the table below, each on all ranks or on one: memory@1,remote@0.
#include "null.h"

enum { SUCCESS = 0, CUDA_ERROR = 1, SYSTEM_ERROR = 2, INTERNAL_ERROR = 3, INVALID_USAGE = 5, REMOTE_ERROR = 6 };
typedef struct {
  const char *name, *call;
  int status;
  const char* last_error;
} Failure;
static const Failure failures[] = {
    {"memory", "send", CUDA_ERROR, "Cuda failure 2 'out of memory'"},
    {"memory_in_init", "init", CUDA_ERROR, "Failed to CUDA calloc 6291456 bytes"},
    {"shm", "init", SYSTEM_ERROR,
     "Error while creating shared memory segment /dev/shm/nccl-XXXX (size 9637888), error: No space left on device (28)"},
    {"interface", "init", INVALID_USAGE, "Bootstrap : no socket interface found"},
    {"version", "init", INVALID_USAGE, "Mismatched NCCL version detected : rank 1 version 22705 rank 0 version 22703"},
    {"duplicate", "init", INVALID_USAGE, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"},
    {"peer_access", "init", CUDA_ERROR, "Cuda failure 217 'peer access is not supported between these two devices'"},
    {"infiniband", "init", SYSTEM_ERROR, "Call to ibv_create_cq failed with error Cannot allocate memory"},
    {"route", "init", SYSTEM_ERROR, "socketStartConnect: Connect to 192.168.19.14<52822> failed : No route to host"},
    {"closed", "init", REMOTE_ERROR, "socketProgress: Connection closed by remote peer node1<40001>"},
    {"remote", "send", REMOTE_ERROR, "socketProgress: Connection closed by remote peer node1<40001>"},
    {"unknown", "send", INTERNAL_ERROR, "Proxy Call to rank 1 failed (Connect)"},
    {"later", "async", REMOTE_ERROR, "socketProgress: Connection closed by remote peer node1<40001>"},
};
static const char* last_error = "";
// How this call of this rank ends.
static int status_of(const char* call, int rank) {
  const char* wanted = getenv("NULLNCCL_FAIL");
  for (int i = 0; wanted && i < (int)(sizeof failures / sizeof *failures); i++) {
    char here[64];
    snprintf(here, sizeof here, "%s@%d", failures[i].name, rank);
    for (const char* each = wanted; *each; each += strcspn(each, ","), each += *each == ',') {
      size_t length = strcspn(each, ",");
      int ours = !strncmp(each, here, length) && (here[length] == '\0' || here[length] == '@');
      if (!ours || strcmp(failures[i].call, call)) continue;
      last_error = failures[i].last_error;
      return failures[i].status;
    }
  }
  return SUCCESS;
}
API const char* ncclGetLastError(void* communicator) { return last_error; }
API const char* ncclGetErrorString(int status) {
  switch (status) {
    case SUCCESS: return "no error";
    case CUDA_ERROR: return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
    case SYSTEM_ERROR: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
    case INVALID_USAGE: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
    case REMOTE_ERROR: return "remote process exited or there was a network error";
    default: return "internal error - please report this issue to the NCCL developers";
  }
}

typedef struct {
  int rank, size;
} Communicator;
typedef struct {
  char bytes[128];
} UniqueId;

static int make(Communicator** made, int size, int rank) {
  int status = status_of("init", rank);
  if (status) return status;
  *made = malloc(sizeof(Communicator));
  **made = (Communicator){rank, size};
  write_log("nccl init comm %p rank %d of %d\n", (void*)*made, rank, size);
  // NCCL reads it once, at the latest here.
  if (!getenv("NCCL_LAUNCH_ORDER_IMPLICIT")) fprintf(stderr, "NULLNCCL init: NCCL_LAUNCH_ORDER_IMPLICIT is not set\n");
  return SUCCESS;
}
API int ncclGetVersion(int* version) { *version = 23007; return SUCCESS; }
API int ncclGetUniqueId(UniqueId* id) {
  for (int i = 0; i < 128; i++) id->bytes[i] = (char)(rand() | 1);
  return SUCCESS;
}
API int ncclCommInitRank(Communicator** made, int size, UniqueId id, int rank) { return make(made, size, rank); }
API int ncclCommInitRankConfig(Communicator** made, int size, UniqueId id, int rank, void* configuration) {
  return make(made, size, rank);
}
API int ncclCommInitRankScalable(Communicator** made, int size, int rank, int n, void* ids, void* configuration) {
  return make(made, size, rank);
}
API int ncclCommCount(Communicator* c, int* size) { *size = c->size; return SUCCESS; }
API int ncclCommUserRank(Communicator* c, int* rank) { *rank = c->rank; return SUCCESS; }
API int ncclCommGetAsyncError(Communicator* c, int* status) {
  *status = status_of("async", c->rank);
  return SUCCESS;
}

static __thread int depth = 0;
static __thread void* group_stream = NULL;
API int ncclGroupStart(void) { depth++; return SUCCESS; }
API int ncclGroupEnd(void) {
  if (--depth) return SUCCESS;
  int status = count_on(COUNT_nccl_groups, group_stream);
  group_stream = NULL;
  return status ? CUDA_ERROR : SUCCESS;
}

static size_t bytes_of(int type) {
  static const int bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return bytes[type];
}
static int message(const char* call, const void* from, size_t sent, const void* to, size_t received, int type, int peer,
                   Communicator* c, void* stream) {
  int status = count_on(COUNT_nccl_calls, stream);
  if (depth == 0) count_on(COUNT_nccl_groups, stream);
  else group_stream = stream;
  const void* buffer = sent ? from : to;
  if ((sent || received) && device_of(buffer) != current_device())
    fprintf(stderr, "NULLNCCL %s: buffer %p lies on %d, current device %d\n", call, buffer, device_of(buffer),
            current_device());
  write_log("nccl %s comm %p stream %p peer %d R %p %zu W %p %zu\n", call, (void*)c, stream, peer, from,
            sent * bytes_of(type), to, received * bytes_of(type));
  return status ? CUDA_ERROR : status_of(call, c->rank);
}
API int ncclSend(const void* from, size_t n, int type, int peer, Communicator* c, void* s) {
  return message("send", from, n, NULL, 0, type, peer, c, s);
}
API int ncclRecv(void* to, size_t n, int type, int peer, Communicator* c, void* s) {
  return message("recv", NULL, 0, to, n, type, peer, c, s);
}
API int ncclAllReduce(const void* from, void* to, size_t n, int type, int operation, Communicator* c, void* s) {
  return message("allreduce", from, n, to, n, type, -1, c, s);
}
API int ncclAllGather(const void* from, void* to, size_t n, int type, Communicator* c, void* s) {
  return message("allgather", from, n, to, n * c->size, type, -1, c, s);
}
API int ncclAlltoAll(const void* from, void* to, size_t n, int type, Communicator* c, void* s) {
  return message("alltoall", from, n * c->size, to, n * c->size, type, -1, c, s);
}
API int ncclReduceScatter(const void* from, void* to, size_t n, int type, int operation, Communicator* c, void* s) {
  return message("reducescatter", from, n * c->size, to, n, type, -1, c, s);
}
API int ncclBroadcast(const void* from, void* to, size_t n, int type, int root, Communicator* c, void* s) {
  return message("broadcast", from, n, to, n, type, root, c, s);
}
API int ncclBcast(void* buffer, size_t n, int type, int root, Communicator* c, void* s) {
  return message("bcast", buffer, n, buffer, n, type, root, c, s);
}
API int ncclReduce(const void* from, void* to, size_t n, int type, int operation, int root, Communicator* c, void* s) {
  return message("reduce", from, n, to, n, type, root, c, s);
}
