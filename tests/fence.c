// A malloc for tests: while the fence is up, every block ends at an inaccessible page and begins behind marked bytes.
//
//   LD_PRELOAD=fence.so python ...     fence(1) before the calls under test, fence(0) after them
//
// What alignment leaves between a block's end and the page is marked too, and so is the block itself: 0xff is NaN in
// every floating type, so what a kernel did not write is not mistaken for a result. free() checks the marks around the
// block, ends the process where one has changed, and makes the block inaccessible for good. Blocks may outlive the fence.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { kPage = 4096, kMark = 0xff };
static const size_t kField = (size_t)1 << 40;  // of address space, handed out once
static const uint64_t kMagic = 0xfe9ce0fe9ce0fe9c;

typedef struct {  // lies just before the block
  uint8_t* pages;
  size_t room, size;
  uint64_t magic;
} Header;

static uint8_t* field;
static size_t used;
static volatile int up;
static void* (*real_malloc)(size_t);
static void (*real_free)(void*);
static void* (*real_realloc)(void*, size_t);
static int (*real_posix_memalign)(void**, size_t, size_t);

__attribute__((constructor)) static void start(void) {
  if (real_free != NULL) return;
  *(void**)&real_malloc = dlsym(RTLD_NEXT, "malloc");
  *(void**)&real_realloc = dlsym(RTLD_NEXT, "realloc");
  *(void**)&real_posix_memalign = dlsym(RTLD_NEXT, "posix_memalign");
  *(void**)&real_free = dlsym(RTLD_NEXT, "free");
  field = mmap(NULL, kField, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (field == MAP_FAILED) abort();
}

void fence(int on) { up = on; }

static void* fenced(size_t alignment, size_t size) {
  if (alignment < 16) alignment = 16;
  const size_t room = (size + alignment + sizeof(Header) + kPage - 1) / kPage * kPage;
  const size_t at = __atomic_fetch_add(&used, room + kPage, __ATOMIC_RELAXED);
  if (at + room + kPage > kField) abort();
  uint8_t* pages = field + at;
  if (mprotect(pages, room, PROT_READ | PROT_WRITE)) return NULL;
  memset(pages, kMark, room);
  uint8_t* block = (uint8_t*)((uintptr_t)(pages + room - size) / alignment * alignment);
  const Header header = {pages, room, size, kMagic};
  memcpy(block - sizeof(Header), &header, sizeof(Header));
  return block;
}

static int is_fenced(const void* block) {
  return field != NULL && (const uint8_t*)block >= field && (const uint8_t*)block < field + kField;
}

static void complain(const char* where, size_t size) {
  char text[160];
  const int n = snprintf(text, sizeof text, "fence: a byte %s a block of %zu bytes was written\n", where, size);
  if (write(2, text, n) < 0) _exit(1);
  abort();
}

static Header header_of(const uint8_t* block) {
  Header header;
  memcpy(&header, block - sizeof(Header), sizeof(Header));
  if (header.magic != kMagic) complain("before", 0);
  return header;
}

static void release(uint8_t* block) {
  const Header header = header_of(block);
  for (const uint8_t* p = header.pages; p < block - sizeof(Header); ++p)
    if (*p != kMark) complain("before", header.size);
  for (const uint8_t* p = block + header.size; p < header.pages + header.room; ++p)
    if (*p != kMark) complain("behind", header.size);
  madvise(header.pages, header.room, MADV_DONTNEED);
  mprotect(header.pages, header.room, PROT_NONE);
}

void* malloc(size_t size) {
  start();
  return up ? fenced(16, size) : real_malloc(size);
}

int posix_memalign(void** out, size_t alignment, size_t size) {
  start();
  if (!up) return real_posix_memalign(out, alignment, size);
  *out = fenced(alignment, size);
  return *out == NULL ? ENOMEM : 0;
}

void* aligned_alloc(size_t alignment, size_t size) {
  void* out = NULL;
  return posix_memalign(&out, alignment < sizeof(void*) ? sizeof(void*) : alignment, size) ? NULL : out;
}

void free(void* block) {
  start();
  if (is_fenced(block)) return release(block);
  real_free(block);
}

void* realloc(void* block, size_t size) {
  start();
  if (!is_fenced(block)) return real_realloc(block, size);
  const size_t old = header_of(block).size;
  void* out = malloc(size);
  memcpy(out, block, old < size ? old : size);
  release(block);
  return out;
}
