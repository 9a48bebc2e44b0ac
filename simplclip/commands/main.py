"""The command `simplclip`: each of these modules adds its command, in the order of the help.

It imports what the command needs when it runs, so that --help needs only the core.
"""

# isort: off
from simplclip.commands import machine as machine
from simplclip.commands import train as train
from simplclip.commands import evaluate as evaluate
from simplclip.commands import plan as plan
from simplclip.commands import export as export
from simplclip.commands import caption as caption
from simplclip.commands import teacher as teacher
from simplclip.commands import data as data

# isort: on
from simplclip.commands.app import app

main = app  # what pyproject.toml and __main__.py call
