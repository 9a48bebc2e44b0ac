"""What every file of the project keeps to, and ruff cannot check."""

import re

from support.paths import ROOT

FOLDERS = ("simplclip", "kernels", "csrc", "tests", "benchmarks", "examples", "docs")
KINDS = (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh")
FILES = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.suffix in KINDS]


def test_no_file_has_more_than_450_lines():
    assert len(FILES) > 300
    assert [path for path in FILES if len(path.read_text().splitlines()) > 450] == []


def test_no_test_imports_a_test():
    """What several tests need is in tests/support."""
    imports = re.compile(r"^ *(?:from|import) +(?:\w+\.)*test_\w+", re.MULTILINE)
    files = (ROOT / "tests").rglob("*.py")
    assert [path for path in files if imports.search(path.read_text())] == []


def test_files_of_tests_have_names_of_their_own():
    """One process collects them by their names."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted({*names})
