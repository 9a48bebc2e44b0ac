"""The command that installs an extra of this package, for errors about a missing package."""

from pathlib import Path

_CHECKOUT = Path(__file__).parents[2] / "setup.py"


def install_command(extra: str) -> str:
    """Returns the command for this environment. pip takes an installed simplclip for what `simplclip[extra]` asks for."""
    return f"pip install --no-build-isolation -e '.[{extra}]'" if _CHECKOUT.exists() else f"pip install 'simplclip[{extra}]'"
