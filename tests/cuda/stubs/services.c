// Counters, log, and memory that is reserved but never filled.
#include "null.h"
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/mman.h>

#define MOST_BLOCKS 200000
#define MOST_DEVICES 64
#define ALIGNMENT ((size_t)2 << 20)

static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

static atomic_long counters[COUNTER_END];
void count(enum counter what) { counters[what]++; }
void count_many(enum counter what, long times) { counters[what] += times; }
API long nullcuda_count(int what) { return what < COUNTER_END ? counters[what] : -1; }
API void nullcuda_reset(void) {
  for (int i = 0; i < COUNTER_END; i++) counters[i] = 0;
}
#define TEXT_OF_COUNTER(name) #name " "
#define TEXT_OF_REPLAYED(name) "replayed_" #name " "
API const char* nullcuda_counters(void) { return COUNTERS(TEXT_OF_COUNTER, TEXT_OF_REPLAYED); }

static FILE* log_file = NULL;
API void nullcuda_log(const char* path) {
  pthread_mutex_lock(&mutex);
  if (log_file) fclose(log_file);
  log_file = path ? fopen(path, "w") : NULL;
  pthread_mutex_unlock(&mutex);
}
void write_log(const char* format, ...) {
  if (!log_file) return;
  va_list values;
  va_start(values, format);
  pthread_mutex_lock(&mutex);
  if (log_file) vfprintf(log_file, format, values);
  pthread_mutex_unlock(&mutex);
  va_end(values);
}
API void nullcuda_note(const char* text) { write_log("# %s\n", text); }

void* new_handle(void) {
  static atomic_long handles = 1000;
  return (void*)(uintptr_t)(16 * atomic_fetch_add(&handles, 1));
}

typedef struct {
  uintptr_t address;
  size_t bytes;
  int device;
} Block;
static Block blocks[MOST_BLOCKS];
static int block_count = 0;
static size_t used[MOST_DEVICES], peak[MOST_DEVICES];
API size_t nullcuda_used(int device) { return used[device]; }
API size_t nullcuda_peak(int device) { return peak[device]; }

static size_t in_pages(size_t bytes) { return (bytes + 4095) & ~(size_t)4095; }

static int reserve_locked(void** pointer, size_t bytes, int device) {
  if (device >= 0 && used[device] + bytes > usable_bytes()) return 2;
  if (block_count == MOST_BLOCKS) return 2;
  void* pages = mmap(NULL, in_pages(bytes) + ALIGNMENT, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) return 2;
  uintptr_t address = ((uintptr_t)pages + ALIGNMENT - 1) & ~(ALIGNMENT - 1), before = address - (uintptr_t)pages;
  if (before) munmap(pages, before);
  munmap((void*)(address + in_pages(bytes)), ALIGNMENT - before);
  blocks[block_count++] = (Block){address, bytes, device};
  *pointer = (void*)address;
  if (device < 0) return 0;
  used[device] += bytes;
  if (used[device] > peak[device]) peak[device] = used[device];
  return 0;
}
int reserve(void** pointer, size_t bytes, int device) {
  *pointer = NULL;
  if (bytes == 0) return 0;
  pthread_mutex_lock(&mutex);
  int status = reserve_locked(pointer, bytes, device);
  pthread_mutex_unlock(&mutex);
  return status;
}
void release(void* pointer) {
  pthread_mutex_lock(&mutex);
  for (int i = block_count - 1; i >= 0; i--)
    if (blocks[i].address == (uintptr_t)pointer) {
      if (blocks[i].device >= 0) used[blocks[i].device] -= blocks[i].bytes;
      munmap(pointer, in_pages(blocks[i].bytes));
      blocks[i] = blocks[--block_count];
      break;
    }
  pthread_mutex_unlock(&mutex);
}
int device_of(const void* pointer) {
  int found = UNKNOWN;
  uintptr_t address = (uintptr_t)pointer;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < block_count && found == UNKNOWN; i++)
    if (address >= blocks[i].address && address < blocks[i].address + blocks[i].bytes) found = blocks[i].device;
  pthread_mutex_unlock(&mutex);
  return found;
}
API int nullcuda_where(const void* pointer) { return device_of(pointer); }
