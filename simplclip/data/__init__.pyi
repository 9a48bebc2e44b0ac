# The public names of simplclip.data, each imported on first use; __init__.py reads this file.

from .errors import EmptyDataError as EmptyDataError
from .errors import ShardError as ShardError
from .errors import Skipped as Skipped
from .held_out_loader import HeldOut as HeldOut
from .held_out_loader import held_out as held_out
from .loader import Loader as Loader
from .pack import pack_shards as pack_shards
from .shards import dataset_size as dataset_size
from .shards import sources_of as sources_of
from .shards import teacher_stamp as teacher_stamp
