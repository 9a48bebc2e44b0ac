"""Writes docs/config.md and docs/commands.md, by the config's fields and the commands' options.

python docs/make_reference.py
"""

import re
from pathlib import Path
from typing import Any

from typer.main import get_command

from simplclip.commands.main import app
from simplclip.train import config

DOCS = Path(__file__).parent

CONFIG = """\
# Every key of a config

For whoever writes a config, beside [training.md](training.md), which explains the main ones.
`simplclip train --help-config` prints the same as YAML. Each key can be set on the command line, as
`--set optim.lr=5e-4`.

`python docs/make_reference.py` writes this page.
"""

COMMANDS = """\
# Every command and its options

For whoever knows what to do, and not by which option; the other pages say what the commands are
for. `simplclip COMMAND --help` prints the same.

`python docs/make_reference.py` writes this page.
"""


def row(*cells: str) -> str:
    """Returns a row of a table: what Markdown would read as a column or as emphasis is escaped."""
    text = (re.sub(r"`[^`]*`|[*<]", escaped, cell.replace("|", r"\|")) for cell in cells)
    return f"| {' | '.join(text)} |\n"


def escaped(match: re.Match) -> str:
    return match[0] if match[0].startswith("`") else f"\\{match[0]}"


def config_page() -> str:
    """Returns a table of each section: key, default, meaning."""
    page = CONFIG
    for key, field in config.keys().items():
        if "." not in key:
            about = field.description or ""
            page += f"\n## {key}\n\n{about[:1].upper()}{about[1:]}.\n\n"
            page += "| key | default | meaning |\n|---|---|---|\n"
            continue
        default = config.default_of(field)
        cells = f"`{key}`", f"`{default}`" if default else "", config.meaning_of(field)
        page += row(*cells)
    return page


def section(name: str, command: Any) -> str:
    """Returns a command's words and the table of its arguments and options."""
    words = " ".join(command.help.split())
    example = command.epilog.removeprefix("Example: ")
    text = f"\n## {name}\n\n{words}\n\n```sh\n{example}\n```\n\n"
    text += "| option | default | meaning |\n|---|---|---|\n"
    for param in command.params:
        if param.help is None or getattr(param, "hidden", False):
            continue
        names = param.opts if param.param_type_name == "option" else [param.name.upper()]
        absent = param.default is None or isinstance(param.default, bool)
        default = "" if absent or callable(param.default) else f"`{param.default}`"
        words = " ".join(param.help.split())
        text += row(", ".join(f"`{name}`" for name in names), default, words)
    return text


def commands_page() -> str:
    page = COMMANDS
    for name, command in sorted(get_command(app).commands.items()):  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        for word, child in inner.items() if inner else [("", command)]:
            page += section(f"{name} {word}".strip(), child)
    return page


PAGES = {"config.md": config_page, "commands.md": commands_page}

if __name__ == "__main__":
    for file, page in PAGES.items():
        (DOCS / file).write_text(page(), "utf-8")
