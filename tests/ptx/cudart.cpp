// A CUDA runtime of two GPUs whose memory is the host's. When preloaded, it takes the place of these functions of libcudart for
// torch and for the extension; gpus.py runs the kernels. What CUDA refuses is refused with CUDA's errors.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace {

// An A100 and an RTX 3090: what is asked of the wrong one differs.
struct Gpu {
  int major, minor, processors;
  size_t shared;  // bytes of a block at most, if it asks
};
constexpr Gpu kGpus[] = {{8, 0, 108, 163 << 10}, {8, 6, 82, 99 << 10}};
constexpr int kDevices = 2;
constexpr size_t kSharedWithoutAsking = 48 << 10;
constexpr size_t kArena = size_t(1) << 30, kGap = 4096, kGrain = 512;

// Runs a kernel: its name, device, stream, blocks, threads of a block, bytes of dynamic shared memory, and its arguments.
using Launch = int (*)(const char* kernel, int device, void* stream, int64_t blocks, int threads, int shared, void** arguments);

struct Stream {
  int device;
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

std::recursive_mutex mutex;
char* arenas[kDevices];
size_t used[kDevices];
std::map<char*, size_t> allocations[kDevices];
std::map<const void*, std::string> kernels;                    // by the function on the host
std::map<std::pair<const void*, int>, size_t> shared_limits;  // of kernels on devices
Launch launch = nullptr;
thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local Configuration configuration;

cudaError_t fail(cudaError_t error) {
  last = error;
  return error;
}

cudaError_t start(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  const auto name = kernels.find(kernel);
  if (name == kernels.end() || !launch) return fail(cudaErrorInvalidDeviceFunction);
  if (stream && reinterpret_cast<Stream*>(stream)->device != current) return fail(cudaErrorInvalidResourceHandle);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads < 1 || threads > 1024 || grid.x < 1 || grid.x >= 1u << 31 || grid.y != 1 || grid.z != 1) {
    return fail(cudaErrorInvalidConfiguration);
  }
  const auto limit = shared_limits.find({kernel, current});
  if (shared > (limit == shared_limits.end() ? kSharedWithoutAsking : limit->second)) return fail(cudaErrorInvalidValue);
  const int error = launch(name->second.c_str(), current, stream, grid.x, int(threads), int(shared), arguments);
  return error ? fail(cudaErrorLaunchFailure) : cudaSuccess;
}

}  // namespace

extern "C" {

// For gpus.py.

void simplclip_set_launch(Launch function) { launch = function; }

// Writes the addresses and sizes of at most `count` allocations of a device, and returns how many there are.
int64_t simplclip_allocations(int device, int64_t count, uint64_t* out) {
  const std::lock_guard lock(mutex);
  int64_t i = 0;
  for (const auto& [address, size] : allocations[device]) {
    if (i++ < count) *out++ = reinterpret_cast<uint64_t>(address), *out++ = size;
  }
  return i;
}

// Kernels

void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*) {
  if (std::strstr(name, "simplclip")) kernels[function] = name;  // torch has many thousands
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return start(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchKernel(
    const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return start(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (!kernels.count(kernel)) return fail(cudaErrorInvalidDeviceFunction);
  const bool is_known = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (!is_known || value < 0 || size_t(value) > kGpus[current].shared) return fail(cudaErrorInvalidValue);
  shared_limits[{kernel, current}] = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  if (!kernels.count(kernel)) return fail(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  attributes->binaryVersion = kGpus[current].major * 10 + kGpus[current].minor;
  return cudaSuccess;
}

// Devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return fail(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  const Gpu& gpu = kGpus[device];
  *properties = {};
  std::strcpy(properties->name, "tests/ptx");
  properties->major = gpu.major;
  properties->minor = gpu.minor;
  properties->multiProcessorCount = gpu.processors;
  properties->warpSize = 32;
  properties->l2CacheSize = 6 << 20;
  properties->totalGlobalMem = kArena;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// Of the driver: torch asks whether a device is in use.
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last; }

// Memory. New memory holds NaN.

cudaError_t cudaMalloc(void** out, size_t size) {
  const std::lock_guard lock(mutex);
  char*& arena = arenas[current];
  if (!arena) {
    void* const mapped = mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
    arena = static_cast<char*>(mapped);
  }
  size_t& end = used[current];
  if (allocations[current].empty()) end = 0;
  const size_t begin = (end + kGap + kGrain - 1) / kGrain * kGrain;
  if (begin + size + kGap > kArena) return fail(cudaErrorMemoryAllocation);
  end = begin + size;
  allocations[current][arena + begin] = size;
  std::memset(arena + begin, 0xFF, size);
  *out = arena + begin;
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  const std::lock_guard lock(mutex);
  for (auto& each : allocations) {
    if (each.erase(static_cast<char*>(address))) return cudaSuccess;
  }
  return address ? fail(cudaErrorInvalidValue) : cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}

// Streams. What is started has ended when the call returns.

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = reinterpret_cast<cudaStream_t>(new Stream{current});
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = nullptr;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }

}  // extern "C"
