"""The structs and enums of C++ that setup.py writes have the names, types and order of Python's."""

import dataclasses
import importlib
import re
import runpy
import shutil
from enum import IntEnum
from pathlib import Path

import pytest

from simplclip.calls.similarity import ColumnStat, RowStat, SigmoidCall, SigmoidRow
from simplclip.ops import backends, extension
from support.devices import needs_cpu_kernels, needs_triton
from support.paths import ROOT

CALLS = ROOT / "simplclip" / "calls"
HEADERS = runpy.run_path(str(ROOT / "csrc" / "call_headers.py"))
STRUCT = re.compile(r"struct (\w+)(?: : (\w+))? \{\n(.*?)\n\};", re.DOTALL)
MEMBER = re.compile(r"^  (\S+) (\w+)\{\};", re.MULTILINE)


def structs(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Returns struct -> types and names in the order of fields(), those of the base first."""
    result: dict[str, list[tuple[str, str]]] = {}
    for name, base, body in STRUCT.findall(HEADERS["headers"](folder)["call_structs.h"]):
        members = MEMBER.findall(body)
        tied = re.search(r"std::tie\((.*?)\)", body)[1].split(", ")
        assert tied == [member for _, member in members]
        assert bool(base) == (f"std::tuple_cat({base}::fields(), std::tie" in body)
        result[name] = result.get(base, []) + members
    return result


def classes(kind) -> list[type]:
    """Returns the classes of simplclip/calls/ that `kind` accepts."""
    names = [f"simplclip.calls.{file.stem}" for file in CALLS.glob("*.py")]
    values = [value for name in names for value in vars(importlib.import_module(name)).values()]
    return [value for value in values if isinstance(value, type) and kind(value)]


def test_structs_are_the_dataclasses():
    calls = {call.__name__: call for call in classes(dataclasses.is_dataclass)}
    assert len(calls) == 13
    types = HEADERS["_TYPES"]
    assert structs(CALLS) == {
        name: [(types[field.type], field.name) for field in dataclasses.fields(call)]
        for name, call in calls.items()
    }


def test_enums_are_the_enums():
    text = HEADERS["headers"](CALLS)["call_enums.h"]
    enums = classes(lambda value: issubclass(value, IntEnum) and value is not IntEnum)
    assert {RowStat, ColumnStat, SigmoidRow} == set(enums)
    for enum in enums:
        members = {f"k{member.name.title().replace('_', '')}": member for member in enum}
        wanted = ", ".join(f"{name} = {int(member)}" for name, member in members.items())
        assert f"enum class {enum.__name__} {{ {wanted}, kCount = {len(enum)} }};" in text


@needs_triton
def test_rows_of_the_kernels_are_the_enums():
    from simplclip.kernels.similarity import rows

    constants = {name: value.value for name, value in vars(rows).items() if name.isupper()}
    members = {member.name: int(member) for member in (*RowStat, *SigmoidRow)}
    assert constants == {name: members[name] for name in constants}
    assert {member.name for member in SigmoidRow} <= constants.keys()


@needs_cpu_kernels
@pytest.mark.parametrize("names", [("image", "text"), ("ids", "text_ids")])
def test_two_fields_of_one_type_cannot_change_places(names, tmp_path, monkeypatch):
    """The extension that was built before is refused; one that is built then has the new order."""
    shutil.copytree(CALLS, tmp_path / "calls", ignore=shutil.ignore_patterns("*.pyc"))
    file = tmp_path / "calls" / "similarity.py"
    head, _, sigmoid = file.read_text().partition(f"class {SigmoidCall.__name__}:")
    first, second = names
    swap = {first: second, second: first}
    swapped = re.sub(
        rf"^    ({first}|{second}):", lambda m: f"    {swap[m[1]]}:", sigmoid, flags=re.MULTILINE
    )
    file.write_text(f"{head}class {SigmoidCall.__name__}:{swapped}")

    built = Path(backends.extension.__file__)
    assert extension.is_current("_C", built)
    monkeypatch.setattr(extension, "PACKAGE", tmp_path)
    assert not extension.is_current("_C", built)
    before, after = structs(CALLS), structs(tmp_path / "calls")
    order = [swap.get(name, name) for _, name in before["SigmoidCall"]]
    assert order == [name for _, name in after["SigmoidCall"]]
    assert before["SimilarityCall"] == after["SimilarityCall"]
