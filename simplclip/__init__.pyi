# The public names of simplclip, each imported on first use; __init__.py reads this file.

from . import data as data
from . import evaluation as evaluation
from . import export as export
from . import gradient_cache as gradient_cache
from . import kernels as kernels
from . import losses as losses
from . import models as models
from . import nn as nn
from . import ops as ops
from . import plan as plan
from . import teacher as teacher
from . import train as train
from .evaluation.encoder import load as load
from .models.crop import crop_texts as crop_texts
from .models.fold import fold as fold
from .models.inherit import inherit as inherit
from .models.registry import create_model as create_model
from .models.simplify import simplify as simplify
from .ops.backends import backend as backend
from .ops.report import report as report
from .version import __version__ as __version__
