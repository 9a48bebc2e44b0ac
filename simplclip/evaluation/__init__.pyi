# The public names of simplclip.evaluation, each imported on first use; __init__.py reads this file.

from .classification import named as named
from .classification import phrases as phrases
from .classification import zero_shot as zero_shot
from .encoder import Encoder as Encoder
from .encoder import load as load
from .index import BATCH_SIZE as BATCH_SIZE
from .index import Index as Index
from .index import encode as encode
from .index import nearest as nearest
from .index import recall as recall
from .results import KS as KS
from .results import Classification as Classification
from .results import Figure as Figure
from .results import Results as Results
from .results import SplitResult as SplitResult
from .results import first_right as first_right
from .run import VERSIONS as VERSIONS
from .run import Settings as Settings
from .run import blend as blend
from .run import evaluate as evaluate
from .run import evaluate_blend as evaluate_blend
from .run import load_splits as load_splits
from .sheets import contact_sheet as contact_sheet
