/* A CUDA runtime without a device: memory is the host's, copies are copies, and kernels do nothing.
 *
 * What is not here (streams that are destroyed, events that are recorded, kernels that are launched) only has to
 * succeed, and is generated. One device is reported, of compute capability 9.0, in the layouts of CUDA 12 and 13.
 */
#define _POSIX_C_SOURCE 200112L
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };
enum { DEVICE_MEMORY = 2, HANDLE = 64, MULTIPROCESSORS = 132 };
static const size_t MEMORY = (size_t)64 << 30;

static int reserve(void **where, size_t bytes) {
    return posix_memalign(where, 4096, bytes ? bytes : 1) ? OUT_OF_MEMORY : SUCCESS;
}

static int handle(void **where) { return (*where = calloc(1, HANDLE)) ? SUCCESS : OUT_OF_MEMORY; }

/* Memory */

int cudaMalloc(void **where, size_t bytes) { return reserve(where, bytes); }
int cudaMallocHost(void **where, size_t bytes) { return reserve(where, bytes); }
int cudaHostAlloc(void **where, size_t bytes, unsigned flags) { return (void)flags, reserve(where, bytes); }
int cudaMallocFromPoolAsync(void **where, size_t bytes, void *pool, void *stream) {
    return (void)pool, (void)stream, reserve(where, bytes);
}
int cudaFree(void *what) { return free(what), SUCCESS; }
int cudaFreeHost(void *what) { return free(what), SUCCESS; }
int cudaFreeAsync(void *what, void *stream) { return (void)stream, free(what), SUCCESS; }
int cudaMemGetInfo(size_t *unused, size_t *total) { return *unused = *total = MEMORY, SUCCESS; }
int cudaMemPoolCreate(void **pool, const void *properties) { return (void)properties, handle(pool); }

int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
    return (void)kind, memcpy(to, from, bytes), SUCCESS;
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    return (void)stream, cudaMemcpy(to, from, bytes, kind);
}
int cudaMemset(void *to, int value, size_t bytes) { return memset(to, value, bytes), SUCCESS; }
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) {
    return (void)stream, cudaMemset(to, value, bytes);
}

struct pointer_attributes {
    int type, device;
    void *on_device, *on_host;
};

int cudaPointerGetAttributes(struct pointer_attributes *found, void *pointer) {
    found->type = DEVICE_MEMORY;
    found->device = 0;
    found->on_device = found->on_host = pointer;
    return SUCCESS;
}

/* The device */

/* Of cudaDeviceProp only what comes first: the rest differs between versions of CUDA, and is left 0. */
struct properties {
    char name[256], identity[32];
    size_t memory, shared_memory;
    int registers, warp;
    size_t pitch;
    int threads, block[3], grid[3];
    size_t constants;
    int major, minor;
    size_t texture[2];
    int processors[2]; /* CUDA 13 has their number in the first, CUDA 12 in the second */
};
enum { PROPERTIES = 784 }; /* bytes of the least cudaDeviceProp, without what it reserves */

int cudaGetDeviceProperties(struct properties *found, int device) {
    (void)device;
    memset(found, 0, PROPERTIES);
    strcpy(found->name, "stub");
    found->memory = MEMORY;
    found->shared_memory = 48 << 10;
    found->registers = 1 << 16;
    found->warp = 32;
    found->threads = 1024;
    for (int axis = 0; axis < 3; axis++) {
        found->block[axis] = 1024;
        found->grid[axis] = axis ? 65535 : 0x7fffffff;
    }
    found->major = 9;
    found->processors[0] = found->processors[1] = MULTIPROCESSORS;
    return SUCCESS;
}
int cudaGetDeviceProperties_v2(struct properties *found, int device) { return cudaGetDeviceProperties(found, device); }

int cudaDeviceGetAttribute(int *value, int which, int device) {
    (void)device;
    switch (which) {
        case 1: *value = 1024; break;            /* threads of a block */
        case 8: *value = 48 << 10; break;        /* shared memory of a block */
        case 10: *value = 32; break;             /* threads of a warp */
        case 16: *value = MULTIPROCESSORS; break;
        case 39: *value = 2048; break;           /* threads of a multiprocessor */
        case 75: *value = 9; break;              /* compute capability, major */
        case 76: *value = 0; break;              /* and minor */
        case 97: *value = 227 << 10; break;      /* shared memory of a block that asks for more */
        default: *value = 1;
    }
    return SUCCESS;
}

int cudaGetDeviceCount(int *count) { return *count = 1, SUCCESS; }
int cudaGetDevice(int *device) { return *device = 0, SUCCESS; }
int cudaDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, SUCCESS; }

/* Streams, events and kernels */

int cudaStreamCreate(void **stream) { return handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return (void)flags, handle(stream); }
int cudaStreamIsCapturing(void *stream, int *status) { return (void)stream, *status = 0, SUCCESS; }
int cudaEventCreate(void **event) { return handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return (void)flags, handle(event); }
int cudaEventElapsedTime(float *ms, void *from, void *to) { return (void)from, (void)to, *ms = 1, SUCCESS; }

int cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags, int *status) {
    (void)name, (void)version, (void)flags;
    *function = NULL;
    if (status) *status = 1;
    return NOT_FOUND;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *kernel, int threads, size_t memory, unsigned flags) {
    return (void)kernel, (void)threads, (void)memory, (void)flags, *blocks = 2, SUCCESS;
}

struct kernel_attributes {
    size_t shared, constants, local;
    int threads;
};

int cudaFuncGetAttributes(struct kernel_attributes *found, const void *kernel) {
    (void)kernel;
    *found = (struct kernel_attributes){.threads = 1024};
    return SUCCESS;
}
int __cudaGetKernel(void **kernel, void *function) { return *kernel = function, SUCCESS; }
void **__cudaRegisterFatBinary(void *binary) { return (void)binary, calloc(1, HANDLE); }
const char *cudaGetErrorName(int error) { return (void)error, "stub"; }
const char *cudaGetErrorString(int error) { return (void)error, "a stub without a device"; }
