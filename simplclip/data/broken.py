from simplclip.data.errors import BrokenSample, ShardError, Skipped  # noqa: F401  (goes with the last module that imports it)
