// Limits of a GPU.
#pragma once

namespace simplclip {

struct DeviceLimits {
  int major, minor;
  int multiprocessors;
  int shared_bytes_per_block;           // with opt-in
  int shared_bytes_per_multiprocessor;
  int registers_per_multiprocessor;
  int binary_version;                   // architecture of this build's code for the device, 0: none
};

// Returns null, or the error.
const char* device_limits(int device, DeviceLimits* limits);

}  // namespace simplclip
