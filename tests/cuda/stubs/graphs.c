// Stream capture: what capturing streams are given is recorded into a graph, whose launch counts as one launch.
#include "null.h"
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdatomic.h>

#define MOST_STREAMS 64
typedef long Seen[MOST_STREAMS];  // number of the last operation that is over, by stream
typedef struct {
  long contents[COUNTER_END];
} Graph;
typedef struct Capture {
  unsigned long long id;
  enum cudaStreamCaptureMode mode;
  pthread_t thread;
  int invalid, streams;
  cudaStream_t stream[MOST_STREAMS];  // the first one is where it began
  Seen seen[MOST_STREAMS];
  Graph* graph;
  struct Capture* next;
} Capture;
struct CUevent_st {
  int recorded;
  unsigned long long capture;  // 0: recorded outside of any
  Seen seen;
};

static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static Capture* captures = NULL;
static atomic_int capture_count = 0;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static Capture* capture_of(cudaStream_t s, int* number) {
  for (Capture* c = captures; c; c = c->next)
    for (int i = 0; i < c->streams; i++)
      if (c->stream[i] == s) {
        *number = i;
        return c;
      }
  return NULL;
}
static Capture* capture_called(unsigned long long id) {
  Capture* c = captures;
  while (c && c->id != id) c = c->next;
  return c;
}
static cudaError_t invalidate(Capture* c, cudaError_t error) {
  if (!c->invalid) write_log("capture %llu is invalid: error %d\n", c->id, error);
  c->invalid = 1;
  return error;
}
// The error of an operation on an invalid capture, or 0.
static cudaError_t step(Capture* c, int number) {
  c->seen[number][number]++;
  return c->invalid ? cudaErrorStreamCaptureInvalidated : 0;
}

int count_on(enum counter what, void* stream) {
  if (!capture_count) {
    count(what);
    return 0;
  }
  pthread_mutex_lock(&mutex);
  int number, status = 0;
  Capture* c = capture_of(stream, &number);
  if (!c) count(what);
  else if (!(status = step(c, number))) c->graph->contents[what]++;
  pthread_mutex_unlock(&mutex);
  return status;
}
int is_capturing(void* stream) {
  if (!capture_count) return 0;
  pthread_mutex_lock(&mutex);
  int number, found = capture_of(stream, &number) != NULL;
  pthread_mutex_unlock(&mutex);
  return found;
}
int forbid_on(void* stream, int error) {
  if (!capture_count) return 0;
  pthread_mutex_lock(&mutex);
  int number;
  Capture* c = capture_of(stream, &number);
  int status = c ? invalidate(c, error) : 0;
  pthread_mutex_unlock(&mutex);
  return status;
}
// Potentially unsafe calls, as cudaThreadExchangeStreamCaptureMode forbids them to this thread.
int forbid_in_capture(int error) {
  if (!capture_count || thread_mode == cudaStreamCaptureModeRelaxed) return 0;
  int status = 0;
  pthread_mutex_lock(&mutex);
  for (Capture* c = captures; c; c = c->next) {
    int mine = pthread_equal(c->thread, pthread_self()) && c->mode != cudaStreamCaptureModeRelaxed;
    int everyones = c->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (mine || everyones) status = invalidate(c, error);
  }
  pthread_mutex_unlock(&mutex);
  return status;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  enum cudaStreamCaptureMode before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return 0;
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
  static unsigned long long ids = 0;
  int number;
  if (s == NULL || s == cudaStreamLegacy) return cudaErrorStreamCaptureUnsupported;
  pthread_mutex_lock(&mutex);
  cudaError_t status = capture_of(s, &number) ? cudaErrorIllegalState : 0;
  if (!status) {
    Capture* c = calloc(1, sizeof *c);
    *c = (Capture){.id = ++ids, .mode = mode, .thread = pthread_self(), .streams = 1, .next = captures};
    c->stream[0] = s;
    c->graph = calloc(1, sizeof *c->graph);
    captures = c;
    capture_count++;
    write_log("capture %llu begins on stream %p\n", c->id, (void*)s);
  }
  pthread_mutex_unlock(&mutex);
  return status;
}
static int is_joined(const Capture* c) {
  for (int i = 1; i < c->streams; i++)
    if (c->seen[0][i] < c->seen[i][i]) return 0;
  return 1;
}
static cudaError_t end(Capture* c, cudaGraph_t* graph) {
  cudaError_t status = c->invalid ? cudaErrorStreamCaptureInvalidated : is_joined(c) ? 0 : cudaErrorStreamCaptureUnjoined;
  write_log("capture %llu ends: error %d\n", c->id, status);
  for (Capture** at = &captures; *at; at = &(*at)->next)
    if (*at == c) {
      *at = c->next;
      break;
    }
  capture_count--;
  if (status) free(c->graph);
  else *graph = (cudaGraph_t)c->graph;
  free(c);
  return status;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  int number;
  *graph = NULL;
  pthread_mutex_lock(&mutex);
  Capture* c = capture_of(s, &number);
  int elsewhere = c && c->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(c->thread, pthread_self());
  cudaError_t status = !c          ? cudaErrorIllegalState
                       : number    ? invalidate(c, cudaErrorStreamCaptureUnmatched)
                       : elsewhere ? cudaErrorStreamCaptureWrongThread
                                   : end(c, graph);
  pthread_mutex_unlock(&mutex);
  return status;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                                         const cudaGraphEdgeData** edges, size_t* n) {
  int number;
  pthread_mutex_lock(&mutex);
  Capture* c = capture_count ? capture_of(s, &number) : NULL;
  *status = !c           ? cudaStreamCaptureStatusNone
            : c->invalid ? cudaStreamCaptureStatusInvalidated
                         : cudaStreamCaptureStatusActive;
  if (id) *id = c ? c->id : 0;
  if (graph) *graph = c ? (cudaGraph_t)c->graph : NULL;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (n) *n = 0;
  pthread_mutex_unlock(&mutex);
  return 0;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(s, status, NULL, NULL, NULL, NULL, NULL);
}

// Events: inside of a capture they are edges of the graph, by which other streams join the capture.
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = calloc(1, sizeof **event);
  return 0;
}
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return 0; }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s) {
  int number;
  pthread_mutex_lock(&mutex);
  Capture* c = capture_of(s, &number);
  event->recorded = 1;
  event->capture = c ? c->id : 0;
  if (c) memcpy(event->seen, c->seen[number], sizeof(Seen));
  else count(COUNT_events_recorded);
  cudaError_t status = c && c->invalid ? cudaErrorStreamCaptureInvalidated : 0;
  pthread_mutex_unlock(&mutex);
  write_log("record event %p stream %p\n", (void*)event, (void*)s);
  return status;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t s, unsigned flags) {
  return cudaEventRecord(event, s);
}
// A stream waits for an event of the capture `c`, and is one of its streams from now on.
static cudaError_t join(Capture* c, cudaStream_t s, cudaEvent_t event) {
  int number = 0;
  while (number < c->streams && c->stream[number] != s) number++;
  if (number == MOST_STREAMS) return invalidate(c, cudaErrorStreamCaptureUnsupported);
  if (number == c->streams) c->stream[c->streams++] = s;
  for (int i = 0; i < MOST_STREAMS; i++)
    if (event->seen[i] > c->seen[number][i]) c->seen[number][i] = event->seen[i];
  return step(c, number);
}
static cudaError_t wait_for(cudaStream_t s, cudaEvent_t event) {
  int number;
  Capture *here = capture_of(s, &number), *there = event->capture ? capture_called(event->capture) : NULL;
  if (there && here && here != there) return invalidate(here, invalidate(there, cudaErrorStreamCaptureMerge));
  if (there) return join(there, s, event);
  if (here && event->recorded) return invalidate(here, cudaErrorStreamCaptureIsolation);
  if (event->capture) return cudaErrorCapturedEvent;
  if (!here) count(COUNT_events_awaited);
  return 0;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t event, unsigned flags) {
  pthread_mutex_lock(&mutex);
  cudaError_t status = wait_for(s, event);
  pthread_mutex_unlock(&mutex);
  write_log("wait stream %p event %p\n", (void*)s, (void*)event);
  return status;
}
// The host asks for an event.
static cudaError_t ask(cudaEvent_t event) {
  pthread_mutex_lock(&mutex);
  Capture* c = event->capture ? capture_called(event->capture) : NULL;
  if (c) invalidate(c, cudaErrorCapturedEvent);
  cudaError_t status = event->capture ? cudaErrorCapturedEvent : forbid_in_capture(cudaErrorStreamCaptureUnsupported);
  pthread_mutex_unlock(&mutex);
  return status;
}
API cudaError_t cudaEventQuery(cudaEvent_t event) { return ask(event); }
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  count(COUNT_event_waits);
  write_log("eventsync %p\n", (void*)event);
  return ask(event);
}
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t a, cudaEvent_t b) {
  *milliseconds = 0.001f;
  return a->capture || b->capture ? cudaErrorInvalidResourceHandle : 0;
}

// Graphs: their contents are never more than counts; what they are is in the log, between begin and end.
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long flags) {
  Graph* copy = malloc(sizeof *copy);
  *copy = *(Graph*)graph;
  *made = (cudaGraphExec_t)copy;
  return 0;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(made, graph, flags);
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t s) {
  if (is_capturing(s)) return forbid_on(s, cudaErrorStreamCaptureUnsupported);
  const long* contents = ((Graph*)graph)->contents;
  count(COUNT_launches);
  count(COUNT_graph_launches);
#define REPLAY(name) count_many(COUNT_replayed_##name, contents[COUNT_##name]);
  IN_GRAPHS(REPLAY)
  write_log("graph launch %p stream %p: launches %ld products %ld nccl %ld copies %ld\n", (void*)graph, (void*)s,
            contents[COUNT_launches], contents[COUNT_products], contents[COUNT_nccl_calls], contents[COUNT_on_device]);
  return 0;
}
API cudaError_t cudaGraphUpload(cudaGraphExec_t graph, cudaStream_t s) { return 0; }
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* n) {
  const long* contents = ((Graph*)graph)->contents;
  *n = contents[COUNT_launches] + contents[COUNT_products] + contents[COUNT_nccl_groups] + contents[COUNT_on_device];
  return 0;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) { free(graph); return 0; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { free(graph); return 0; }
