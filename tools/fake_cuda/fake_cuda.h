/* What both halves of fake CUDA share: the devices, their memory, and what has been counted. */

#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <stdbool.h>
#include <stddef.h>

enum { MAX_DEVICES = 64 };
#define DEVICE_MEMORY (80ul << 30)

/* From the environment: FAKE_CUDA_DEVICES (1), FAKE_CUDA_CAPABILITY (90). */
int fake_cuda_devices(void);
int fake_cuda_capability(void);

/* That of this thread. */
int fake_cuda_current_device(void);

/* An attribute of every device; the numbers of cudaDeviceAttr and CUdevice_attribute are the same. */
int fake_cuda_attribute(int attribute);

/* Note that `function` needs a context on the current device of this thread. The first of each device of a process is
   written as a line "context PROCESS DEVICE FUNCTION" to the file that FAKE_CUDA_LOG names. */
void fake_cuda_need_context(const char *function);
bool fake_cuda_has_context(int device);

/* Addresses of device memory, which nobody can read or write; NULL where this process may have no more. */
void *fake_cuda_reserve(size_t bytes, int device);
void fake_cuda_release(void *address);

/* Count memory of a device as used (or, below 0, as free); false where there is not as much. */
bool fake_cuda_use(long bytes, int device);

/* One more kernel, product, copy or collective on a stream, a CUDA stream of either API. */
void fake_cuda_count_launch(void *stream, const char *function);

/* Captures (capture.c). */
bool fake_cuda_capture_launch(struct CUstream_st *stream, const char *function);
enum cudaError fake_cuda_capture_forbids(bool always, const char *function);
unsigned long long fake_cuda_capture_of(struct CUstream_st *stream);
bool fake_cuda_capture_goes_on(unsigned long long id);
enum cudaError fake_cuda_capture_wait(struct CUstream_st *stream, struct CUstream_st *source, unsigned long long id);

#endif
