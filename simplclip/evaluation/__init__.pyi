# The public names of simplclip.evaluation, each imported on first use; __init__.py reads this file.

from .classification import class_names as class_names
from .classification import named as named
from .classification import phrases as phrases
from .classification import zero_shot as zero_shot
from .encoder import Encoder as Encoder
from .encoder import load as load
from .index import BATCH_SIZE as BATCH_SIZE
from .index import Index as Index
from .index import encode as encode
from .results import Classification as Classification
from .results import Figure as Figure
from .results import ModelResult as ModelResult
from .results import Results as Results
from .results import Retrieval as Retrieval
from .results import SplitResult as SplitResult
from .retrieval import KS as KS
from .retrieval import nearest as nearest
from .retrieval import recall as recall
from .run import Settings as Settings
from .run import evaluate as evaluate
from .sheets import contact_sheet as contact_sheet
from .split import LEAST_SAMPLES as LEAST_SAMPLES
from .split import Split as Split
from .split import Towers as Towers
from .split import load_splits as load_splits
