/* The capture of streams into graphs. A graph is the number of its launches; starting it replays that number.

   As with a GPU, what a capture forbids ends it in an error: a launch on the default stream, a wait of the host, memory
   from the device outside of the relaxed mode, waiting for an event from before it, a fork that is not joined. Other
   threads may do as they like during a capture of the mode "thread local" (NCCL's watchdog asks for its events at any
   time), but for what concerns the captured streams themselves: a wait for the whole device, or for their events. */

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include <cuda_runtime_api.h>

#include "fake_cuda.h"

struct CUgraph_st {
    long launches;
};

struct CUgraphExec_st {
    long launches;
};

typedef struct {
    cudaStream_t stream;
    bool joined; /* the first stream of the capture has waited for all of its launches */
} Branch;

enum { MAX_BRANCHES = 16 };

static struct {
    pthread_mutex_t lock;
    Branch branches[MAX_BRANCHES]; /* the first is where the capture began */
    int num_branches;              /* 0: there is none */
    unsigned long long id;
    enum cudaStreamCaptureMode mode;
    pthread_t thread;  /* where it began */
    cudaError_t fault; /* that ended the capture */
    long launches;
} capture = {.lock = PTHREAD_MUTEX_INITIALIZER};

static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static atomic_long replays, replayed, captures;

/* For tests: graphs that were started, launches in them, captures that ended well. */
long fake_cuda_replays(void) { return replays; }
long fake_cuda_replayed(void) { return replayed; }
long fake_cuda_captures(void) { return captures; }

/* Note what a capture does not allow, which ends it in an error, and say what it was. */
static cudaError_t fail(cudaError_t fault, const char *function) {
    if (capture.fault == cudaSuccess)
        fprintf(stderr, "fake CUDA: %s in a capture: %s\n", function, cudaGetErrorName(fault));
    capture.fault = fault;
    return fault;
}

static Branch *find_branch(cudaStream_t stream) {
    for (int place = 0; place < capture.num_branches; place++)
        if (capture.branches[place].stream == stream)
            return &capture.branches[place];
    return NULL;
}

/* Note a launch; true where it is captured, and therefore does not run. */
bool fake_cuda_capture_launch(cudaStream_t stream, const char *function) {
    pthread_mutex_lock(&capture.lock);
    Branch *branch = find_branch(stream);
    if (branch != NULL) {
        capture.launches++;
        branch->joined = branch == capture.branches;
    } else if (capture.num_branches > 0 && stream == NULL && pthread_equal(capture.thread, pthread_self())) {
        fail(cudaErrorStreamCaptureImplicit, function);
    }
    pthread_mutex_unlock(&capture.lock);
    return branch != NULL;
}

/* Whether this thread may not make calls that are potentially unsafe during a capture: the table of
   cudaThreadExchangeStreamCaptureMode. The lock is held. */
static bool forbids_unsafe_calls(void) {
    if (thread_mode == cudaStreamCaptureModeRelaxed)
        return false;
    if (pthread_equal(capture.thread, pthread_self()))
        return capture.mode != cudaStreamCaptureModeRelaxed;
    return thread_mode == cudaStreamCaptureModeGlobal && capture.mode == cudaStreamCaptureModeGlobal;
}

/* A call that a capture forbids, in any mode of any thread if it is `always`; its error, if there is a capture. */
cudaError_t fake_cuda_capture_forbids(bool always, const char *function) {
    pthread_mutex_lock(&capture.lock);
    bool forbidden = capture.num_branches > 0 && (always || forbids_unsafe_calls());
    if (forbidden)
        fail(cudaErrorStreamCaptureUnsupported, function);
    pthread_mutex_unlock(&capture.lock);
    return forbidden ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

/* Which capture an event belongs to that is recorded on a stream now; 0: none. */
unsigned long long fake_cuda_capture_of(cudaStream_t stream) {
    pthread_mutex_lock(&capture.lock);
    unsigned long long id = find_branch(stream) == NULL ? 0 : capture.id;
    pthread_mutex_unlock(&capture.lock);
    return id;
}

/* Whether a capture goes on. */
bool fake_cuda_capture_goes_on(unsigned long long id) {
    pthread_mutex_lock(&capture.lock);
    bool goes_on = id != 0 && capture.num_branches > 0 && id == capture.id;
    pthread_mutex_unlock(&capture.lock);
    return goes_on;
}

/* `stream` waits for an event that was recorded on `source` in capture `id`, or outside of any (0). */
cudaError_t fake_cuda_capture_wait(cudaStream_t stream, cudaStream_t source, unsigned long long id) {
    cudaError_t fault = cudaSuccess;
    pthread_mutex_lock(&capture.lock);
    if (capture.num_branches > 0) {
        Branch *branch = find_branch(stream), *other = find_branch(source);
        if (id == capture.id && branch == NULL && capture.num_branches < MAX_BRANCHES)
            capture.branches[capture.num_branches++] = (Branch){stream, false};
        else if (id == capture.id && other != NULL && branch != other)
            other->joined = true;
        else if (id != capture.id && branch != NULL)
            fault = fail(cudaErrorStreamCaptureIsolation, "cudaStreamWaitEvent");
    }
    pthread_mutex_unlock(&capture.lock);
    return fault;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    if (stream == NULL || capture.num_branches > 0)
        return cudaErrorStreamCaptureUnsupported;
    pthread_mutex_lock(&capture.lock);
    capture.branches[0] = (Branch){stream, true};
    capture.num_branches = 1;
    capture.id++;
    capture.mode = mode;
    capture.thread = pthread_self();
    capture.fault = cudaSuccess;
    capture.launches = 0;
    pthread_mutex_unlock(&capture.lock);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    pthread_mutex_lock(&capture.lock);
    cudaError_t fault = capture.fault;
    for (int place = 0; place < capture.num_branches; place++)
        if (!capture.branches[place].joined && fault == cudaSuccess)
            fault = fail(cudaErrorStreamCaptureUnjoined, __func__);
    capture.num_branches = 0;
    pthread_mutex_unlock(&capture.lock);
    if (fault != cudaSuccess)
        return fault;
    captures++;
    *graph = malloc(sizeof **graph);
    (*graph)->launches = capture.launches;
    return cudaSuccess;
}

static cudaError_t find_capture(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id) {
    unsigned long long found = fake_cuda_capture_of(stream);
    *status = found ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    if (id != NULL)
        *id = found;
    return cudaSuccess;
}

#if CUDART_VERSION < 13000
// Without edges; the name of the one with them ends in _v3.
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **dependencies, size_t *num_dependencies
) {
    return find_capture(stream, status, id);
}
#undef cudaStreamGetCaptureInfo
#define cudaStreamGetCaptureInfo cudaStreamGetCaptureInfo_v3
#endif

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges, size_t *num_dependencies
) {
    return find_capture(stream, status, id);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    return find_capture(stream, status, NULL);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *num_nodes) {
    *num_nodes = graph->launches;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *instance, cudaGraph_t graph, unsigned long long flags) {
    *instance = malloc(sizeof **instance);
    (*instance)->launches = graph->launches;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t stream) {
    fake_cuda_need_context(__func__);
    fake_cuda_count_launch(stream, __func__);
    replays++;
    replayed += instance->launches;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    free(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t instance) {
    free(instance);
    return cudaSuccess;
}
