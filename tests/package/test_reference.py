"""docs/config.md and docs/commands.md have every key and every option, as the sources say."""

import runpy

import pytest

from support.paths import ROOT

PAGES = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["PAGES"]


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_that_of_the_sources(name):
    made, kept = PAGES[name](), (ROOT / "docs" / name).read_text("utf-8")
    assert made == kept, "python docs/make_reference.py makes it anew"
