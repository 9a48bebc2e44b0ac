# The public names of simplclip.models, each imported on first use; __init__.py reads this file.

from .naming import PLAIN as PLAIN
from .presets import Spec as Spec
from .registry import create as create
from .registry import names as names
from .registry import spec_of as spec_of
from .registry import tokenizer as tokenizer
from .registry import transforms as transforms
