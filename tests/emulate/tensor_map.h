// What the emulator's cuTensorMapEncodeTiled leaves in the 128 opaque bytes of a CUtensorMap.
#pragma once
#include <cstdint>

namespace emulate {

struct TensorMap {
  static constexpr uint32_t kMark = 0x7a31b0e5;
  uint32_t mark;
  uint8_t element_bytes, rank, swizzle;   // swizzle: log2 of the pattern's row over 16 bytes, 0 for none
  uint64_t base;
  uint64_t size[5];
  uint64_t stride[4];      // bytes, of dimensions 1 …
  uint16_t box[5];
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace emulate
