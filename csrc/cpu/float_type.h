// Types of floats in memory.
#pragma once

namespace simplclip {

enum class Float { kFloat, kBFloat16, kHalf };

}  // namespace simplclip
