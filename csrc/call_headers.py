"""The C++ structs and enums of the calls, generated from simplclip/calls/.

setup.py writes them to build/call_structs.h and build/call_enums.h. A field has one name and one
position: that of the Python dataclass, in the dispatcher's schema and in C++ too. The files are
parsed, not imported: at a build, nothing is installed yet. Imports the standard library alone.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_TYPES = {
    "Tensor": "Tensor",
    "Strided": "Tensor",
    "Mutated": "Tensor",
    "Tensor | None": "std::optional<Tensor>",
    "Strided | None": "std::optional<Tensor>",
    "int": "int64_t",
    "bool": "bool",
    "float": "double",
    "str": "std::string",
    "list[bool]": "std::vector<bool>",
}
_STRUCTS = """// Written by setup.py: the dataclasses of simplclip/calls/.
#pragma once

#include "../csrc/common.h"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace simplclip {{

{body}

}}  // namespace simplclip
"""
_ENUMS = """// Written by setup.py: the enums of simplclip/calls/.
#pragma once

namespace simplclip {{

{body}

}}  // namespace simplclip
"""


def headers(folder: Path) -> dict[str, str]:
    """Returns the name and the text of each header. folder: simplclip/calls."""
    files = sorted(folder.glob("*.py"))
    return {
        "call_structs.h": _header(_STRUCTS, files, _structs),
        "call_enums.h": _header(_ENUMS, files, _enums),
    }


def _header(template: str, files: list[Path], generate: Callable[[str], Iterator[str]]) -> str:
    body = [text for file in files for text in generate(file.read_text())]
    return template.format(body="\n\n".join(body))


def _classes(source: str) -> Iterable[ast.ClassDef]:
    return (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))


def _names(expressions: Iterable[ast.expr]) -> set[str]:
    nodes = itertools.chain.from_iterable(map(ast.walk, expressions))
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def _structs(source: str) -> Iterator[str]:
    """Yields a struct for each dataclass, with the comments at the ends of the fields' lines."""
    lines = source.splitlines()
    for node in _classes(source):
        if "dataclass" not in _names(node.decorator_list):
            continue
        names = []
        members = []
        for field in node.body:
            if not isinstance(field, ast.AnnAssign):
                continue
            assert isinstance(field.target, ast.Name)
            name = field.target.id
            comment = lines[field.end_lineno - 1].partition("  # ")[2]
            member = f"  {_TYPES[ast.unparse(field.annotation)]} {name}{{}};"
            names.append(name)
            members.append(f"{member}  // {comment}" if comment else member)
        tie = f"std::tie({', '.join(names)})"
        bases = [ast.unparse(base) for base in node.bases]
        if bases:
            tie = f"std::tuple_cat({bases[0]}::fields(), {tie})"
        head = " : ".join([f"struct {node.name}", *bases])
        body = "\n".join(members)
        yield f"{head} {{\n{body}\n\n  auto fields() {{ return {tie}; }}\n}};"


def _enums(source: str) -> Iterator[str]:
    """Yields an enum for each IntEnum: LSE_STUDENT is kLseStudent, and kCount their number."""
    for node in _classes(source):
        if "IntEnum" not in _names(node.bases):
            continue
        members = []
        for member in node.body:
            if isinstance(member, ast.Assign):
                (target,) = member.targets
                name = "k" + ast.unparse(target).title().replace("_", "")
                members.append(f"{name} = {ast.unparse(member.value)}")
        members.append(f"kCount = {len(members)}")
        yield f"enum class {node.name} {{ {', '.join(members)} }};"
