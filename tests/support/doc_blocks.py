"""The python blocks of a section of a page in docs/."""

import re

from paths import ROOT


def run(page: str, heading: str) -> dict:
    """Runs the blocks as one program, and returns the names that it defines."""
    section = (ROOT / "docs" / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    names: dict = {"__name__": heading}
    exec(
        compile(
            "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)),
            f"{page}: {heading}",
            "exec",
        ),
        names,
    )
    return names
