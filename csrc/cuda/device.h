// What a kernel may use of a GPU.
#pragma once

namespace simplclip {

struct DeviceLimits {
  int major, minor;
  int multiprocessors;
  int shared_bytes_per_block;           // with opt-in
  int shared_bytes_per_multiprocessor;
  int registers_per_multiprocessor;
  int binary_version;                   // architecture of the code that this build runs there, 0: none fits
};

// Returns null, or why the device cannot be asked.
const char* device_limits(int device, DeviceLimits* limits);

}  // namespace simplclip
