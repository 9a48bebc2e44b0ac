"""simplclip: fused ops and a minimal trainer for CLIP on one consumer GPU (SiCLIP, arXiv
2411.14789).

Importing compiles nothing and needs neither a GPU nor Triton nor the C++ extension; without the
extension the ops run in plain torch. Submodules are imported on first use, so that the command line
can set up threads before torch starts.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
