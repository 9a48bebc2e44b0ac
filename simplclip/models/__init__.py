"""Models by name: registry.py builds, simplify.py replaces blocks, inherit.py copies weights."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
