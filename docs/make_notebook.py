"""Writes examples/first_day.ipynb: docs/your-photos.md as a notebook, for Colab or Jupyter.

python docs/make_notebook.py

A shell block becomes lines with "!", a YAML block a file that is written, a Python block a cell.
Cells that install or fetch something have the tag "setup", and stand before the page's.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, NOTEBOOK = ROOT / "docs" / "your-photos.md", ROOT / "examples" / "first_day.ipynb"

INSTALL = """\
## On Colab

The next cell clones the repository and installs simplclip with the extras `demo` and `export`. pip
keeps Colab's torch if it is 2.11 or later. Compiling the CPU kernels takes some minutes. If the
notebook was opened in a clone, the cell installs that clone.

A T4 has compute capability 7.5. The GPU kernels of simplclip are for 8.0 and later. On a T4 the ops
therefore run in plain torch, by the backend `reference`, and attention by torch's own kernels,
`sdpa`. The cell ends with `simplclip doctor`, which names the backend of each op. Training computes
in float32 there, since a T4 has no bfloat16. The batches of this page need no kernels: the matrix
of 128 pairs takes 64 KiB. On an L4 or an A100 the Triton kernels run. This notebook has run on a
CPU, but not on these GPUs yet."""

SETUP = """\
import os

URL = "URL"  # the address of the repository
if os.path.exists("../examples/first_day.ipynb"):
    %cd ..
elif not os.path.exists("examples/first_day.ipynb"):
    !git clone -q $URL simplclip
    %cd simplclip
!pip install -q 'torch>=2.11' torchvision 'setuptools>=77' ninja
!SIMPLCLIP_CUDA=0 pip install -q --no-build-isolation -e '.[demo,export]'
!simplclip doctor"""

STAMPS = """\
# These are 951 captioned pictures of a Debian package. Upload your own to simplclip/photos instead,
# if you have some.
!apt-get -qq update && apt-get -qq install tuxpaint-stamps-default
import shutil
from pathlib import Path

stamps = Path("/usr/share/tuxpaint/stamps")
for text in stamps.rglob("*.txt"):
    caption = text.read_text("utf-8", "replace").partition("\\n")[0].strip()
    image = text.with_suffix(".png")
    if caption and image.exists():
        copy = Path("photos", image.relative_to(stamps))
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, copy)
        copy.with_suffix(".txt").write_text(caption)"""

SHOW = """\
from IPython.display import Image, display

for path in ("runs/photos/curves.png", "runs/photos/evaluation-held_out.png", "hits.png"):
    display(Image(path))"""


def cell(kind: str, text: str, number: int, tags: tuple[str, ...] = ()) -> dict:
    metadata = {"tags": [*tags]} if tags else {}
    made = {"cell_type": kind, "id": f"cell-{number:02}", "metadata": metadata}
    made["source"] = text.splitlines(keepends=True)
    if kind == "code":
        made |= {"execution_count": None, "outputs": []}
    return made


def code_of(language: str, text: str) -> str:
    if language == "yaml":
        name, _, rest = text.partition("\n")
        return f"%%writefile {name.removeprefix('# ')}\n{rest}"
    if language == "sh":
        return "".join(f"!{line}\n" for line in text.replace("\\\n", " ").splitlines())
    return text


def cells(page: str) -> list[dict]:
    """Returns the cells of the page but its last section's, with links from examples/."""
    text = page.split("\n## With a GPU")[0]
    text = re.sub(r"\]\((?!https?:|#)([\w./-]+)", r"](../docs/\1", text)
    introduction, _, rest = text.partition("\n## 1. ")
    made = [("markdown", introduction, ()), ("markdown", INSTALL, ())]
    made += [("code", SETUP, ("setup",)), ("code", STAMPS, ("setup",))]
    # words, language, block, words, ...
    parts = re.split(r"```(\w+)\n(.*?)```\n", f"## 1. {rest}", flags=re.DOTALL)
    for words, language, block in zip(parts[::3], [*parts[1::3], ""], [*parts[2::3], ""]):
        if words.strip():
            made.append(("markdown", words, ()))
        if block:
            made.append(("code", code_of(language, block), ()))
        if "simplclip evaluate" in block:
            made.append(("code", SHOW, ()))
    return [cell(kind, text.strip(), i, tags) for i, (kind, text, tags) in enumerate(made)]


def notebook(page: str) -> str:
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    about = {"cells": cells(page), "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(about, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(PAGE.read_text("utf-8")), "utf-8")
