# The public names of simplclip.train, each imported on first use; __init__.py reads this file.

from .loop import Interrupted as Interrupted
from .loop import TrainingError as TrainingError
from .loop import run as run
