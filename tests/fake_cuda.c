// What Triton's CUDA driver calls in libcuda.so.1: all succeeds, nothing is done, and launches are handed to `on_launch`.

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned attribute_count;
} Config;

static void (*on_launch)(const Config *, void *function, void **params);

void tell(void (*callback)(const Config *, void *, void **)) { on_launch = callback; }

#define SUCCEEDS(name) int name(void) { return 0; }
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuDevicePrimaryCtxRetain)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuStreamIsCapturing)

int cuGetErrorString(int code, const char **text) { *text = "no error"; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 227 << 10; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = 1024; return 0; }
int cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) {
  *(unsigned long long *)value = pointer;
  return 0;
}

// Every module is another, and its function is the next number.
int cuModuleLoadData(void **module, const void *image) {
  static char *last = (char *)0x1000;
  *module = last += 16;
  return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = (char *)module + 1;
  return 0;
}

int cuLaunchKernelEx(const Config *config, void *function, void **params, void **extra) {
  on_launch(config, function, params);
  return 0;
}
