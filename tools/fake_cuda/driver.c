/* The other half of fake CUDA: the driver, which Triton, torch.compile and the allocator's expandable segments
   call. As with the runtime (runtime.c), sizes of memory are real, and kernels do nothing; they are compiled all the
   same. Functions that are not here succeed and do nothing: `build.py` makes them, from cuda.h. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "fake_cuda.h"

CUresult cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "an error of fake CUDA's driver";
    return CUDA_SUCCESS;
}

CUresult cuGetProcAddress(
    const char *name, void **function, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *result
) {
    *function = dlsym(RTLD_DEFAULT, name);
    return *function == NULL ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

/* NVRTC asks for tables of functions that no header knows. */
CUresult cuGetExportTable(const void **table, const CUuuid *id) { return CUDA_ERROR_NOT_FOUND; }

CUresult cuDeviceGetCount(int *count) {
    *count = fake_cuda_devices();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int number) {
    *device = number;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = fake_cuda_attribute(attribute);
    return CUDA_SUCCESS;
}

/* ---- Contexts: all the same one, since the runtime keeps count of them */

static CUcontext context = (CUcontext)1;

CUresult cuCtxGetCurrent(CUcontext *current) {
    *current = context;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *primary, CUdevice device) {
    *primary = context;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = fake_cuda_has_context(device);
    return CUDA_SUCCESS;
}

/* ---- Memory: a handle is what `cuMemCreate` took from a device */

typedef struct {
    long bytes;
    int device;
} Handle;

CUresult cuMemGetAllocationGranularity(
    size_t *bytes, const CUmemAllocationProp *properties, CUmemAllocationGranularity_flags option
) {
    *bytes = 2 << 20;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(
    CUdeviceptr *address, size_t bytes, size_t alignment, CUdeviceptr wanted, unsigned long long flags
) {
    *address = (CUdeviceptr)fake_cuda_reserve(bytes, fake_cuda_current_device());
    return *address == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
    fake_cuda_release((void *)address);
    return CUDA_SUCCESS;
}

CUresult cuMemCreate(
    CUmemGenericAllocationHandle *handle, size_t bytes, const CUmemAllocationProp *properties, unsigned long long flags
) {
    Handle made = {bytes, properties->location.id};
    if (!fake_cuda_use(made.bytes, made.device))
        return CUDA_ERROR_OUT_OF_MEMORY;
    Handle *kept = malloc(sizeof made);
    *kept = made;
    *handle = (CUmemGenericAllocationHandle)kept;
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    Handle *kept = (Handle *)handle;
    fake_cuda_use(-kept->bytes, kept->device);
    free(kept);
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr *)value = address;
    return CUDA_SUCCESS;
}

/* ---- Kernels */

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    if (fake_cuda_capture_forbids(false, __func__)) /* it may wait for the device */
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    *module = (CUmodule)1;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoad(CUmodule *module, const char *path) { return cuModuleLoadData(module, path); }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)1;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0; /* no spills, no shared memory */
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
    *clusters = 1;
    return CUDA_SUCCESS;
}

static CUresult launch(const char *function, CUstream stream) {
    fake_cuda_need_context(function);
    fake_cuda_count_launch(stream, function);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(
    CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
    unsigned block_z, unsigned shared_bytes, CUstream stream, void **parameters, void **extra
) {
    return launch(__func__, stream);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    return launch(__func__, config->hStream);
}
