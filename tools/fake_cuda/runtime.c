/* A fake CUDA runtime, cuBLAS, cuDNN and NCCL: PyTorch, loaded after it, sees NVIDIA GPUs where there are none.

   Real: all code of the host (PyTorch's operators and allocator, autograd, FSDP, torch.compile, Triton and its
   compiler), sizes and limits of memory, which thread needs a context on which device.
   Not real: kernels, products, convolutions and collectives, which do nothing and take no time; so work is done the
   moment it is enqueued, and whatever is read from a device is zero. One number alone has a value: the sum of one float
   over all processes, by which a run sees that they are all there.

   Functions that are not here succeed and do nothing: `build.py` makes them. For tests there are

       long fake_cuda_launches(void)          kernels, products, copies, collectives and graphs put on a stream
       long fake_cuda_synchronizations(void)  calls in which the host would have waited, or might have, for a device

   and what capture.c counts of graphs. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include <cuda_runtime_api.h>

#include "fake_cuda.h"

/* ---- Devices and contexts */

static __thread int current_device;
static atomic_bool has_context[MAX_DEVICES];
static atomic_long launches, synchronizations;

static int number_from_environment(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text == NULL ? otherwise : atoi(text);
}

int fake_cuda_devices(void) { return number_from_environment("FAKE_CUDA_DEVICES", 1); }
int fake_cuda_capability(void) { return number_from_environment("FAKE_CUDA_CAPABILITY", 90); }
int fake_cuda_current_device(void) { return current_device; }
long fake_cuda_launches(void) { return launches; }
long fake_cuda_synchronizations(void) { return synchronizations; }
bool fake_cuda_has_context(int device) { return has_context[device]; }
void fake_cuda_count_launch(void *stream, const char *function) {
    launches += !fake_cuda_capture_launch(stream, function);
}

/* The host waits for the device; `captured`: for something that is being captured, which cannot end. */
static cudaError_t synchronize(bool captured, const char *function) {
    synchronizations++;
    return fake_cuda_capture_forbids(captured, function);
}

int fake_cuda_attribute(int attribute) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: return fake_cuda_capability() / 10;
        case cudaDevAttrComputeCapabilityMinor: return fake_cuda_capability() % 10;
        case cudaDevAttrMultiProcessorCount: return 132;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxThreadsPerBlock: return 1024;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrMaxRegistersPerBlock: return 65536;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 227 << 10;
        case cudaDevAttrL2CacheSize: return 50 << 20;
        case cudaDevAttrClockRate: return 1980000;
        case cudaDevAttrMemoryClockRate: return 2619000;
        case cudaDevAttrGlobalMemoryBusWidth: return 5120;
        default: return 1; /* what is asked for by yes or no is there */
    }
}

void fake_cuda_need_context(const char *function) {
    if (atomic_exchange(&has_context[current_device], true))
        return;
    const char *path = getenv("FAKE_CUDA_LOG");
    if (path == NULL)
        return;
    char line[256];
    int length = snprintf(line, sizeof line, "context %d %d %s\n", getpid(), current_device, function);
    int file = open(path, O_WRONLY | O_APPEND | O_CREAT, 0644);
    if (file < 0 || write(file, line, length) != length) /* at once: lines of several processes do not mix */
        abort();
    close(file);
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = fake_cuda_devices();
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= fake_cuda_devices())
        return cudaErrorInvalidDevice;
    current_device = device;
    fake_cuda_need_context(__func__);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = fake_cuda_attribute(attribute);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    /* So that nobody takes what a benchmark writes here for a GPU's. */
    strcpy(properties->name, fake_cuda_capability() == 80 ? "fake A100" : "fake H100");
    properties->major = fake_cuda_attribute(cudaDevAttrComputeCapabilityMajor);
    properties->minor = fake_cuda_attribute(cudaDevAttrComputeCapabilityMinor);
    properties->totalGlobalMem = DEVICE_MEMORY;
    properties->multiProcessorCount = fake_cuda_attribute(cudaDevAttrMultiProcessorCount);
    properties->warpSize = fake_cuda_attribute(cudaDevAttrWarpSize);
    properties->maxThreadsPerBlock = fake_cuda_attribute(cudaDevAttrMaxThreadsPerBlock);
    properties->maxThreadsPerMultiProcessor = fake_cuda_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    properties->maxBlocksPerMultiProcessor = 32;
    properties->regsPerBlock = properties->regsPerMultiprocessor = fake_cuda_attribute(cudaDevAttrMaxRegistersPerBlock);
    properties->sharedMemPerBlock = fake_cuda_attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    properties->sharedMemPerBlockOptin = fake_cuda_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    properties->sharedMemPerMultiprocessor = 228 << 10;
    properties->l2CacheSize = fake_cuda_attribute(cudaDevAttrL2CacheSize);
    properties->textureAlignment = 512;
    for (int axis = 0; axis < 3; axis++) {
        properties->maxThreadsDim[axis] = axis < 2 ? 1024 : 64;
        properties->maxGridSize[axis] = axis < 1 ? 2147483647 : 65535;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:%02x:00.0", device);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorStreamCaptureImplicit: return "a launch on the default stream in a capture";
        case cudaErrorStreamCaptureIsolation: return "a wait in a capture for an event from outside of it";
        case cudaErrorStreamCaptureUnjoined: return "a capture with a stream that was not joined";
        case cudaErrorStreamCaptureUnsupported: return "a call that a capture does not allow";
        default: return "an error of fake CUDA";
    }
}

const char *cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

/* The driver's functions, by name. */
cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result
) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (result != NULL)
        *result = *function == NULL ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* ---- Memory: of the host, which is real, or of a device, which are addresses alone */

typedef struct {
    char *begin;
    size_t bytes;
    int device; /* ON_HOST: pinned memory */
} Range;

enum { ON_HOST = -1, MAX_RANGES = 1 << 14 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Range ranges[MAX_RANGES]; /* those that were removed have no bytes */
static int num_ranges;
static long used[MAX_DEVICES];

static void add_range(void *begin, size_t bytes, int device) {
    pthread_mutex_lock(&lock);
    int place = 0;
    while (place < num_ranges && ranges[place].bytes > 0)
        place++;
    if (place == MAX_RANGES)
        abort();
    num_ranges += place == num_ranges;
    ranges[place] = (Range){begin, bytes, device};
    pthread_mutex_unlock(&lock);
}

/* The range that holds an address, and no bytes where there is none; it may be removed. */
static Range find_range(const void *address, bool remove) {
    Range found = {0};
    pthread_mutex_lock(&lock);
    for (int place = 0; place < num_ranges; place++) {
        Range *range = &ranges[place];
        if ((char *)address >= range->begin && (char *)address < range->begin + range->bytes) {
            found = *range;
            if (remove)
                range->bytes = 0;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static bool on_device(const void *address) {
    Range range = find_range(address, false);
    return range.bytes > 0 && range.device != ON_HOST;
}

static bool is_pinned(const void *address) {
    Range range = find_range(address, false);
    return range.bytes > 0 && range.device == ON_HOST;
}

bool fake_cuda_use(long bytes, int device) {
    pthread_mutex_lock(&lock);
    bool enough = used[device] + bytes <= (long)DEVICE_MEMORY;
    if (enough)
        used[device] += bytes;
    pthread_mutex_unlock(&lock);
    return enough;
}

static void *map_pages(size_t bytes, int access, int device) {
    void *address = mmap(NULL, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED)
        return NULL;
    add_range(address, bytes, device);
    return address;
}

void *fake_cuda_reserve(size_t bytes, int device) { return map_pages(bytes, PROT_NONE, device); }

void fake_cuda_release(void *address) {
    Range range = find_range(address, true);
    if (range.bytes > 0)
        munmap(range.begin, range.bytes);
}

cudaError_t cudaMalloc(void **address, size_t bytes) {
    fake_cuda_need_context(__func__);
    if (fake_cuda_capture_forbids(false, __func__))
        return cudaErrorStreamCaptureUnsupported;
    if (!fake_cuda_use(bytes, current_device))
        return cudaErrorMemoryAllocation;
    *address = fake_cuda_reserve(bytes, current_device);
    return *address == NULL ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFree(void *address) {
    Range range = find_range(address, false);
    if (range.bytes > 0)
        fake_cuda_use(-(long)range.bytes, range.device);
    fake_cuda_release(address);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    fake_cuda_need_context(__func__);
    *total = DEVICE_MEMORY;
    *free = DEVICE_MEMORY - used[current_device];
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    fake_cuda_need_context(__func__);
    if (fake_cuda_capture_forbids(false, __func__))
        return cudaErrorStreamCaptureUnsupported;
    *address = map_pages(bytes, PROT_READ | PROT_WRITE, ON_HOST);
    return *address == NULL ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFreeHost(void *address) {
    fake_cuda_release(address);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags) {
    fake_cuda_need_context(__func__);
    add_range(address, bytes, ON_HOST);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *address) {
    find_range(address, true);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    memset(attributes, 0, sizeof *attributes); /* memory that CUDA does not know */
    Range range = find_range(address, false);
    if (range.bytes > 0) {
        attributes->type = range.device == ON_HOST ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
        attributes->device = range.device == ON_HOST ? 0 : range.device;
        attributes->devicePointer = attributes->hostPointer = (void *)address;
    }
    return cudaSuccess;
}

/* ---- Copies */

static const void *sum_address; /* where the last sum of one float over all processes lies, on a device */
static float sum;

static void copy(void *target, const void *source, size_t bytes) {
    if (on_device(target))
        return;
    if (!on_device(source))
        memmove(target, source, bytes);
    else if (source == sum_address && bytes == sizeof sum)
        memcpy(target, &sum, bytes);
    else
        memset(target, 0, bytes);
}

cudaError_t cudaMemcpy(void *target, const void *source, size_t bytes, enum cudaMemcpyKind kind) {
    fake_cuda_need_context(__func__);
    copy(target, source, bytes);
    return synchronize(false, __func__);
}

cudaError_t cudaMemcpyAsync(
    void *target, const void *source, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream
) {
    fake_cuda_need_context(__func__);
    fake_cuda_count_launch(stream, __func__);
    /* From or to memory that is not pinned, a copy is not asynchronous. */
    bool waits = !(on_device(target) || is_pinned(target)) || !(on_device(source) || is_pinned(source));
    copy(target, source, bytes);
    return waits ? synchronize(fake_cuda_capture_of(stream) != 0, __func__) : cudaSuccess;
}

cudaError_t cudaMemset(void *target, int value, size_t bytes) {
    fake_cuda_need_context(__func__);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *target, int value, size_t bytes, cudaStream_t stream) {
    fake_cuda_need_context(__func__);
    fake_cuda_count_launch(stream, __func__);
    return cudaSuccess;
}

/* ---- Streams and events. Work is done the moment it is enqueued; events have the host's time. */

struct CUstream_st {
    int priority;
};

struct CUevent_st {
    struct timespec time;
    cudaStream_t stream; /* where it was recorded last, */
    unsigned long long capture; /* and in which capture, if not 0 */
    bool recorded;
};

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    fake_cuda_need_context(__func__);
    *stream = calloc(1, sizeof **stream);
    (*stream)->priority = priority;
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    free(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = stream == NULL ? 0 : stream->priority;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    fake_cuda_need_context(__func__);
    return synchronize(fake_cuda_capture_of(stream) != 0, __func__);
}

cudaError_t cudaDeviceSynchronize(void) {
    fake_cuda_need_context(__func__);
    return synchronize(true, __func__);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    fake_cuda_need_context(__func__);
    *event = calloc(1, sizeof **event);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    clock_gettime(CLOCK_MONOTONIC, &event->time);
    event->stream = stream;
    event->capture = fake_cuda_capture_of(stream);
    event->recorded = true;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    return event->recorded ? fake_cuda_capture_wait(stream, event->stream, event->capture) : cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    return fake_cuda_capture_forbids(fake_cuda_capture_goes_on(event->capture), __func__);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return synchronize(fake_cuda_capture_goes_on(event->capture), __func__);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    *milliseconds = 1e3 * (end->time.tv_sec - begin->time.tv_sec) + 1e-6 * (end->time.tv_nsec - begin->time.tv_nsec);
    return cudaSuccess;
}

/* ---- Kernels */

static cudaError_t launch(const char *function, cudaStream_t stream) {
    fake_cuda_need_context(function);
    fake_cuda_count_launch(stream, function);
    return cudaSuccess;
}

/* What stands between <<< and >>> is kept until the kernel is launched. */
static __thread struct {
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
} configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
    configuration.grid = grid, configuration.block = block;
    configuration.shared_bytes = shared_bytes, configuration.stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes, cudaStream_t *stream) {
    *grid = configuration.grid, *block = configuration.block;
    *shared_bytes = configuration.shared_bytes, *stream = configuration.stream;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(
    const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared_bytes, cudaStream_t stream
) {
    return launch(__func__, stream);
}

cudaError_t cudaLaunchKernel(
    const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared_bytes, cudaStream_t stream
) {
    return launch(__func__, stream);
}

cudaError_t cudaLaunchCooperativeKernel(
    const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared_bytes, cudaStream_t stream
) {
    return launch(__func__, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
    return launch(__func__, config->stream);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    function(data);
    return cudaSuccess;
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}

char __cudaInitModule(void **handle) { return 1; }

cudaError_t __cudaGetKernel(const void **kernel, const void *function) {
    *kernel = function;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = fake_cuda_capability();
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *kernel, int threads, size_t shared_bytes, unsigned flags
) {
    *blocks = 2;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int *blocks, const void *kernel, int threads, size_t shared_bytes
) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, threads, shared_bytes, 0);
}

cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    *address = fake_cuda_reserve(1 << 16, current_device);
    return cudaSuccess;
}

/* ---- cuBLAS: only what returns something, or counts */

int cublasCreate_v2(void **handle) {
    *handle = calloc(1, sizeof(cudaStream_t)); /* of its stream */
    return 0;
}

int cublasSetStream_v2(cudaStream_t *handle, cudaStream_t stream) {
    *handle = stream;
    return 0;
}

int cublasDestroy_v2(void *handle) {
    free(handle);
    return 0;
}

int cublasGetMathMode(void *handle, int *mode) {
    *mode = 0;
    return 0;
}

int cublasGetPointerMode_v2(void *handle, int *mode) {
    *mode = 0;
    return 0;
}

int cublasLtMatmulDescCreate(void **description) { return cublasCreate_v2(description); }
int cublasLtMatmulDescDestroy(void *description) { return cublasDestroy_v2(description); }
int cublasLtMatmulPreferenceCreate(void **preference) { return cublasCreate_v2(preference); }
int cublasLtMatmulPreferenceDestroy(void *preference) { return cublasDestroy_v2(preference); }
int cublasLtMatrixLayoutCreate(void **layout) { return cublasCreate_v2(layout); }
int cublasLtMatrixLayoutDestroy(void *layout) { return cublasDestroy_v2(layout); }

int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *description, void *a, void *b, void *c, void *d, void *preference, int num_wanted,
    void *algorithms, int *num_found
) {
    *num_found = 1;
    return 0;
}

int cublasLtMatmul(
    void *handle, void *description, const void *alpha, const void *a, void *a_layout, const void *b, void *b_layout,
    const void *beta, const void *c, void *c_layout, void *d, void *d_layout, const void *algorithm, void *workspace,
    size_t bytes, cudaStream_t stream
) {
    return launch(__func__, stream);
}

int cublasGemmEx(cudaStream_t *handle) { return launch(__func__, *handle); }
int cublasGemmStridedBatchedEx(cudaStream_t *handle) { return launch(__func__, *handle); }
int cublasSgemm_v2(cudaStream_t *handle) { return launch(__func__, *handle); }
int cublasSgemmStridedBatched(cudaStream_t *handle) { return launch(__func__, *handle); }

/* ---- cuDNN, whose handles are like those of cuBLAS: convolutions run, and attention finds no plan */

enum { CUDNN_ENGINES_FOUND = 202, CUDNN_INT64 = 3 };

/* 9.19.0, which torch 2.11 brings. With a recent version, PyTorch prefers cuDNN's attention on Hopper. */
size_t cudnnGetVersion(void) { return 91900; }

int cudnnCreate(void **handle) { return cublasCreate_v2(handle); }
int cudnnDestroy(void *handle) { return cublasDestroy_v2(handle); }
int cudnnSetStream(cudaStream_t *handle, cudaStream_t stream) { return cublasSetStream_v2(handle, stream); }

int cudnnGetStream(cudaStream_t *handle, cudaStream_t *stream) {
    *stream = *handle;
    return 0;
}

/* There is one engine for each graph of operators; it needs no memory of its own. */
int cudnnBackendGetAttribute(
    void *descriptor, int name, int type, int64_t num_wanted, int64_t *num_found, void *values
) {
    if (num_found != NULL)
        *num_found = name == CUDNN_ENGINES_FOUND;
    if (type == CUDNN_INT64 && values != NULL)
        memset(values, 0, num_wanted * sizeof(int64_t));
    return 0;
}

int cudnnBackendExecute(cudaStream_t *handle, void *plan, void *variants) { return launch(__func__, *handle); }

/* ---- NCCL: as many ranks as were said to be there, each on its own */

typedef struct {
    unsigned long name;
    char unused[120];
} UniqueId;

typedef struct {
    int num_ranks, rank, num_splits;
    unsigned long name;
} Communicator;

enum { NCCL_FLOAT = 7 };

int ncclGetUniqueId(UniqueId *id) {
    *id = (UniqueId){0};
    return getrandom(&id->name, sizeof id->name, 0) != sizeof id->name;
}

int ncclGetVersion(int *version) {
    *version = 22900;
    return 0;
}

const char *ncclGetErrorString(int error) { return "an error of fake NCCL"; }
const char *ncclGetLastError(Communicator *communicator) { return ""; }

int ncclCommInitRankConfig(Communicator **communicator, int num_ranks, UniqueId id, int rank, void *config) {
    fake_cuda_need_context(__func__);
    *communicator = malloc(sizeof **communicator);
    **communicator = (Communicator){num_ranks, rank, 0, id.name};
    return 0;
}

/* PyTorch 2.15 compares the sizes of tensors with this. */
int ncclCommCount(Communicator *communicator, int *count) {
    *count = communicator->num_ranks;
    return 0;
}

/* Where the ranks of a communicator tell each other which part each of them joins. */
typedef struct {
    atomic_int num_arrived, num_left;
    int parts[];
} Split;

/* As NCCL does, waits until all ranks of the communicator have called this; -1 joins no part. */
int ncclCommSplit(Communicator *communicator, int part, int rank, Communicator **made, void *config) {
    int num_ranks = communicator->num_ranks, size = 0;
    size_t bytes = sizeof(Split) + num_ranks * sizeof(int);
    char path[64];
    snprintf(path, sizeof path, "/dev/shm/fake-nccl-%lx-%d", communicator->name, communicator->num_splits++);
    int file = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, bytes) != 0)
        return 1;
    Split *split = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (split == MAP_FAILED)
        return 1;
    split->parts[communicator->rank] = part;
    split->num_arrived++;
    while (split->num_arrived < num_ranks)
        usleep(100);
    for (int other = 0; other < num_ranks; other++)
        size += split->parts[other] == part;
    if (++split->num_left == num_ranks)
        unlink(path);
    munmap(split, bytes);
    *made = NULL;
    UniqueId id = {communicator->name * 31 + communicator->num_splits * 7919 + part};
    return part < 0 ? 0 : ncclCommInitRankConfig(made, size, id, rank, config);
}

int ncclCommDestroy(Communicator *communicator) {
    free(communicator);
    return 0;
}

int ncclCommAbort(Communicator *communicator) { return ncclCommDestroy(communicator); }

int ncclCommGetAsyncError(Communicator *communicator, int *error) {
    *error = 0;
    return 0;
}

int ncclAllReduce(
    const void *source, void *target, size_t count, int type, int operation, Communicator *communicator,
    cudaStream_t stream
) {
    if (count == 1 && type == NCCL_FLOAT) {
        sum_address = target;
        sum = communicator->num_ranks;
    }
    return launch(__func__, stream);
}

int ncclAllGather(
    const void *source, void *target, size_t count, int type, Communicator *communicator, cudaStream_t stream
) {
    return launch(__func__, stream);
}

int ncclReduceScatter(
    const void *source, void *target, size_t count, int type, int operation, Communicator *communicator,
    cudaStream_t stream
) {
    return launch(__func__, stream);
}

int ncclBroadcast(
    const void *source, void *target, size_t count, int type, int root, Communicator *communicator, cudaStream_t stream
) {
    return launch(__func__, stream);
}
