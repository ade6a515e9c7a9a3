/* What both halves of the stand-in know: the devices, their memory, and what has been counted. */

#ifndef STAND_IN_H
#define STAND_IN_H

#include <stdbool.h>
#include <stddef.h>

enum { MAX_DEVICES = 64 };
#define DEVICE_MEMORY (80ul << 30)

/* From the environment: STAND_IN_DEVICES (1), STAND_IN_CAPABILITY (90). */
int stand_in_devices(void);
int stand_in_capability(void);

/* That of this thread. */
int stand_in_current_device(void);

/* An attribute of every device; the numbers of cudaDeviceAttr and CUdevice_attribute are the same. */
int stand_in_attribute(int attribute);

/* Note that `function` needs a context on the current device of this thread. The first of each device of a process is
   written as a line "context PROCESS DEVICE FUNCTION" to the file that STAND_IN_LOG names. */
void stand_in_need_context(const char *function);
bool stand_in_has_context(int device);

/* Addresses of device memory, which nobody can read or write; NULL where this process may have no more. */
void *stand_in_reserve(size_t bytes, int device);
void stand_in_release(void *address);

/* Count memory of a device as used (or, below 0, as free); false where there is not as much. */
bool stand_in_use(long bytes, int device);

/* One more kernel, product, copy or collective on a stream. */
void stand_in_count_launch(void);

#endif
