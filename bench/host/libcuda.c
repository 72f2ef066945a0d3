/* A CUDA driver for a machine without a GPU: the calls that Triton makes to load and launch kernels, which do not run.

   It takes the place of libcuda.so.1, has every call that Triton 3.6 to 3.9 make by name, counts launches and reports
   them to a function, if one is set. `stub_device` sets the properties of the device, whatever its number. */

#include <stddef.h>
#include <stdint.h>

typedef struct { /* the beginning of CUlaunchConfig */
  unsigned grid[3], block[3], shared_memory;
} launch_config;
typedef void (*listener)(uint64_t function, unsigned x, unsigned y, unsigned z, unsigned threads,
                         unsigned shared_memory, void **parameters);

static uint64_t launches, modules;
static int capability, shared_memory;
static listener told;

uint64_t stub_launches(void) { return launches; }
void stub_device(int new_capability, int bytes) { capability = new_capability; shared_memory = bytes; }
void stub_listen(listener function) { told = function; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the stub driver"; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 10: *value = 32; break;                 /* warp size */
  case 12: *value = 65536; break;              /* registers of a block */
  case 16: *value = 132; break;                /* multiprocessors */
  case 75: *value = capability / 10; break;    /* compute capability, major */
  case 76: *value = capability % 10; break;    /* minor */
  case 97: *value = shared_memory; break;      /* of a block, opted in */
  default: *value = 0;
  }
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)++modules; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = module; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0; /* threads of a block */
  return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuLaunchKernelEx(const launch_config *config, void *function, void **parameters, void **extra) {
  launches++;
  if (told)
    told((uint64_t)function, config->grid[0], config->grid[1], config->grid[2],
         config->block[0] * config->block[1] * config->block[2], config->shared_memory, parameters);
  return 0;
}
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return 0; }
int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return 0; }
int cuTensorMapEncodeTiled(void *map, ...) { return 0; }
int cuTensorMapEncodeIm2col(void *map, ...) { return 0; }
