"""Loss modules with open_clip's signatures on top of the fused ops.

They expect L2-normalised features [N, D]. docs/losses.md has the losses of other libraries and
their equals here. Label smoothing, several positives and decoupled losses are a few lines each with
RowwiseLoss, docs/recipes.md.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
