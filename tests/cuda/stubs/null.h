// What the stubs share: the machine that the environment describes, counters, and the log.
#pragma once
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define API __attribute__((visibility("default")))

static inline int env_int(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value ? atoi(value) : otherwise;
}
static inline double env_double(const char* name, double otherwise) {
  const char* value = getenv(name);
  return value ? atof(value) : otherwise;
}
static inline int device_count(void) { return env_int("NULLCUDA_DEVICES", 8); }
static inline const char* device_name(void) {
  const char* name = getenv("NULLCUDA_NAME");
  return name ? name : "NVIDIA H100 80GB HBM3 (null)";
}
static inline size_t device_bytes(void) { return (size_t)(env_double("NULLCUDA_GIB", 79.1) * (1 << 30)); }
// Without what CUDA takes before the first tensor, and others since they were last seen.
static inline size_t usable_bytes(void) {
  return device_bytes() - (size_t)600000000 - (size_t)(env_double("NULLCUDA_UNSEEN_GIB", 0) * (1 << 30));
}

// Compute capability as in sm_90.
static inline int capability(void) { return env_int("NULLCUDA_CC", 90); }
static inline int multiprocessors(void) {
  switch (capability()) {
    case 80: return 108;
    case 86: return 82;
    case 90: return 132;
    case 100: return 148;
    case 120: return 170;
    default: return 128;
  }
}
static inline int threads_per_multiprocessor(void) {
  int c = capability();
  return c == 75 ? 1024 : c == 86 || c == 89 || c == 120 ? 1536 : 2048;
}
static inline int shared_per_block(void) {
  switch (capability()) {
    case 75: return 65536;
    case 80: return 166912;
    case 90: case 100: return 232448;
    default: return 101376;
  }
}
static inline int shared_per_multiprocessor(void) {
  return capability() == 75 ? 65536 : shared_per_block() + 1024;
}
static inline void device_uuid(unsigned char* uuid, int device) {
  for (int i = 0; i < 16; i++) uuid[i] = (unsigned char)(i + device * 17 + 1);
}

// What graphs are looked into for: counted again, as `replayed_...`, with each launch of a graph.
#define IN_GRAPHS(X) X(launches) X(triton_launches) X(products) X(nccl_calls) X(nccl_groups) X(on_device)
#define COUNTERS(X, REPLAYED)                                                                                      \
  IN_GRAPHS(X) X(stream_waits) X(device_waits) X(event_waits) X(to_host) X(to_device) X(allocations) X(releases)   \
  X(events_recorded) X(events_awaited) X(graph_launches) IN_GRAPHS(REPLAYED)
#define NAME_OF_COUNTER(name) COUNT_##name,
#define NAME_OF_REPLAYED(name) COUNT_replayed_##name,
enum counter { COUNTERS(NAME_OF_COUNTER, NAME_OF_REPLAYED) COUNTER_END };
void count(enum counter what);
void count_many(enum counter what, long times);

// Capture (graphs.c). Each returns an error of CUDA, or 0.
// Counts what a stream is given, or records it where the stream is capturing.
int count_on(enum counter what, void* stream);
int is_capturing(void* stream);
// What no capturing stream takes; and what a thread must not call meanwhile. Both make captures invalid.
int forbid_on(void* stream, int error);
int forbid_in_capture(int error);

// Appends to the log while `nullcuda_log` has named one.
void write_log(const char* format, ...) __attribute__((format(printf, 1, 2)));
void* new_handle(void);

enum { ON_HOST = -1, UNKNOWN = -2 };
// Returns 0, or 2 where the device is full. `device`: its number, or ON_HOST.
int reserve(void** pointer, size_t bytes, int device);
// The device of a pointer, ON_HOST where it is pinned, UNKNOWN where it is not ours.
int device_of(const void* pointer);
int current_device(void);
