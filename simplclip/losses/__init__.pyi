# The public names of simplclip.losses, each imported on first use; __init__.py reads this file.

from .clip import ClipPMLoss as ClipPMLoss
from .drop_in import ClipLoss as ClipLoss
from .drop_in import CoCaLoss as CoCaLoss
from .drop_in import SigLipLoss as SigLipLoss
from .matryoshka import MatryoshkaLoss as MatryoshkaLoss
from .rowwise import RowwiseLoss as RowwiseLoss
from .wikd import WIKDLoss as WIKDLoss
