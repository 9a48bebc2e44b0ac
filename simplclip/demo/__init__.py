"""The demo, not part of the library: pairs of emoji and names, and a teacher from PyPI packages.

emoji.py and emoji_sources.py build the data; teacher.py is the teacher, builtin.py trains and loads it.
`simplclip.common.plugins` finds these parts by entry points.
"""

from importlib import resources
from pathlib import Path


def package(name: str, why: str) -> Path:
    """Returns the folder of an installed package. `why` begins the error message if the package is missing."""
    try:
        return Path(str(resources.files(name)))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{why} the package {name!r}: pip install 'simplclip[demo]'", name=name) from error
