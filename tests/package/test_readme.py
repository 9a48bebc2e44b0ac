"""README.md, CONTRIBUTING.md and docs/: their examples run, and the names in them exist.

    python   the blocks of one file run in order, as one program, and use no deprecated name
    diff     its new side is a part of that program, and its old side runs too
    sh       a line is a command of a kind below; its targets, options, settings, extras and files
             exist
    yaml     a file for the shell lines, named in its first line: `# NAME.yaml`
    mermaid  a picture; the files that it names exist
    text     a formula

Blocks in other languages and indented blocks are errors.
"""

import contextlib
import functools
import importlib
import os
import re
import runpy
import shlex
import traceback
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image
from pydantic import BaseModel
from torch.distributed.run import get_args_parser
from typer.main import get_command

from simplclip import export, models
from simplclip import train as trainer
from simplclip.commands.main import app
from simplclip.train import config, sections
from support.paths import ROOT
from support.programs import forked
from support.train import tiny

pytestmark = pytest.mark.long


FILES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
PHOTOS = "docs/your-photos.md"  # has a config that other pages train
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
OTHERS = ("apt", "conda", "docker", "ncu", "nsys", "pre-commit", "pytest-benchmark", "sudo", "tar")


@functools.cache
def tokens(name: str):
    return MarkdownIt().enable("table").parse((ROOT / name).read_text())


def blocks(name: str, *languages: str) -> list[tuple[int, str, str]]:
    """Returns the blocks in these languages: first line number, language, text."""
    fences = [t for t in tokens(name) if t.type == "fence" and t.info in languages]
    return [(t.map[0] + 2, t.info, t.content) for t in fences]


def commands() -> list:
    """Returns every command of the shell blocks: file and line number, and words."""
    params = []
    for name in FILES:
        for first, _, text in blocks(name, "sh"):
            joined = re.sub(r"\\\n\s*", lambda match: " " * len(match[0]), text)
            for line in re.split(r"\n| && ", joined):
                if words := shlex.split(line, comments=True):
                    title = f"{name}:{first} {' '.join(words)[:60]}"
                    params.append(pytest.param(name, words, id=title))
    return params


def inline(name: str, *kinds: str) -> list:
    """Returns the tokens of these kinds outside of blocks."""
    children = [child for t in tokens(name) if t.type == "inline" for child in t.children]
    return [child for child in children if child.type in kinds]


def words_of(name: str) -> list[str]:
    """Returns the text in backticks outside of blocks."""
    return [child.content for child in inline(name, "code_inline")]


def test_readme_is_short():
    """Rows of tables may be longer."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_the_index_has_every_page():
    """docs/README.md, to which README.md leads, links to each page beside it."""
    index = ROOT / "docs/README.md"
    assert "docs/README.md" in targets("README.md")
    pages = {path.name for path in index.parent.glob("*.md")} - {index.name}
    assert pages - {target.partition("#")[0] for target in targets("docs/README.md")} == set()


def test_the_glossary_has_each_word_once_in_order():
    text = (ROOT / "docs/glossary.md").read_text()
    words = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)[1:]
    assert len(words) > 40
    assert [word.lower() for word in words] == sorted({word.lower() for word in words})


@pytest.mark.parametrize("name", FILES)
def test_every_block_is_of_a_kind_that_is_tested(name):
    kinds = {(t.type, t.info) for t in tokens(name) if t.type in ("fence", "code_block")}
    languages = ("python", "diff", "sh", "yaml", "mermaid", "text")
    assert kinds <= {("fence", language) for language in languages}


def program(name: str, side: str = "+") -> str:
    """Returns the python blocks as one program whose lines keep their numbers; of a diff the new
    (+) or the old (-) side.
    """
    lines: list[str] = []
    for first, language, text in blocks(name, "python", "diff"):
        code = text.splitlines()
        if language == "diff":
            code = [line[1:] if line[:1] in ("", " ", side) else "" for line in code]
        lines += [""] * (first - 1 - len(lines)) + code
    return "\n".join(lines) + "\n"


PROGRAMS = [(name, "+") for name in FILES if blocks(name, "python", "diff")]
PROGRAMS += [(name, "-") for name in FILES if blocks(name, "diff")]
# what a program may use of the reader's own loop: the batch of his loader
BATCH = {"images": torch.zeros(66, 3, 224, 224), "texts": torch.ones(66, 77, dtype=torch.long)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), PROGRAMS)
def test_python_blocks_run(name, side, tmp_path):
    if name in ("docs/evaluation.md", "docs/export.md"):
        write_run(tmp_path)
    if name == "docs/your-photos.md":
        (tmp_path / "photos").mkdir()
        Image.new("RGBA", (8, 8)).save(tmp_path / "photos/key.png")
    file = tmp_path / Path(name).with_suffix(".py").name
    file.write_text(program(name, side))

    def run():
        os.chdir(tmp_path)
        open_clip.create_model = narrow(open_clip.create_model)
        warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
        with open("errors", "w") as errors, contextlib.redirect_stderr(errors):
            try:
                runpy.run_path(str(file), BATCH, run_name="__main__")
            except BaseException:
                traceback.print_exc()
                raise

    assert forked(run) == 0, f"{name}: {(tmp_path / 'errors').read_text()[-3000:]}"


def narrow(create_model):
    """Returns open_clip's create_model with narrow towers for ViT-B-32."""

    def create(name, *args, **options):
        if name == "ViT-B-32":
            options |= {"embed_dim": 64, "vision_cfg": {"width": 64}}
            options["text_cfg"] = {"width": 64, "heads": 2}
        return create_model(name, *args, **options)

    return create


def write_run(folder: Path) -> None:
    """Writes the run, the export and the images that the programs read."""
    out = folder / "runs" / "siclip-lite0-emoji"
    trainer.run(tiny.settings(folder, "run.steps=1", f"run.out={out}"))
    export.run(out, folder / "export")
    for name in ("cat.jpg", "car.jpg"):
        (folder / name).write_bytes(tiny.picture(tiny.COLOURS["red"], "ring"))


@pytest.mark.parametrize(("name", "words"), commands())
def test_commands_exist(name, words, tmp_path, monkeypatch):
    for _, _, text in blocks(name, "yaml") + blocks(PHOTOS, "yaml"):
        (tmp_path / text.partition("\n")[0].removeprefix("# ")).write_text(text)
    monkeypatch.chdir(tmp_path)
    check_command(list(words))


def check_command(words: list[str]) -> None:
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        variable = words.pop(0).partition("=")[0]
        assert variable in sources(), variable
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "torchrun":
        parsed = get_args_parser().parse_args(arguments)
        assert parsed.module
        program, arguments = parsed.training_script, parsed.training_script_args
    if program in ("python", "python3") and arguments[0] == "-m":
        program, arguments = arguments[1], arguments[2:]
    checks = {
        "make": check_make,
        "simplclip": check_simplclip,
        "simplclip-open-clip": check_open_clip_train,
        "simplclip.integrations.open_clip_train": check_open_clip_train,
        "pip": check_pip,
        "uv": lambda rest: check_pip(rest[1:]) if rest[0] == "pip" else None,
        "pytest": lambda rest: [(ROOT / file).stat() for file in rest if file.startswith("tests")],
        "python": lambda rest: check_script(ROOT / rest[0], rest[1:]),
    }
    if program.startswith("benchmarks."):
        path = ROOT / program.replace(".", "/")
        check_script(path if path.is_dir() else path.with_suffix(".py"), arguments)
    elif program not in ("git", "cd", "venv", ".", *OTHERS):
        assert program in checks, f"{program}: expected one of {sorted(checks)}"
        checks[program](arguments)


def check_script(path: Path, arguments: list[str]) -> None:
    """The script, or a module of the package, parses each option by its name."""
    files = path.glob("*.py") if path.is_dir() else [path]
    text = "".join(file.read_text() for file in files)
    for argument in arguments:
        assert not argument.startswith("-") or f'"{argument}"' in text, f"{path.name}: {argument}"


@functools.cache
def sources() -> str:
    """Returns all files that may read an environment variable, strings that span lines joined."""
    files = [ROOT / "setup.py", *(ROOT / "simplclip").rglob("*.py")]
    files += (ROOT / "csrc").rglob("*.[ch]*")
    return MAKEFILE + re.sub(r'"\n\s*f?"', "", "".join(path.read_text() for path in files))


def check_make(arguments: list[str]) -> None:
    for argument in arguments:
        variable, assigned, _ = argument.partition("=")
        known = rf"^{argument}:"
        if assigned:
            known = rf"\$\((or \$\()?{variable}\)|^{variable} "
        assert re.search(known, MAKEFILE, re.MULTILINE), argument


def check_simplclip(arguments: list[str]) -> None:
    """Parses a command without running it, and reads the config's settings."""
    parsed = {}

    def disarm(command):
        for child in getattr(command, "commands", {}).values():
            disarm(child)
        if not hasattr(command, "commands"):
            command.callback = lambda **values: parsed.update(values)

    parser = get_command(app)
    disarm(parser)
    parser.main(arguments, standalone_mode=False)
    source = parsed.get("config")
    if source is not None:
        if source.startswith("examples/"):
            source = ROOT / source
        config.load(source, parsed.get("set_") or ())


def check_open_clip_train(arguments: list[str]) -> None:
    from open_clip_train.params import parse_args

    parse_args([argument for argument in arguments if argument != "--crop-texts"])


def check_pip(arguments: list[str]) -> None:
    """An extra exists; a package with a version is one that pyproject.toml names so."""
    assert arguments[0] == "install"
    for argument in arguments[1:]:
        if extras := re.fullmatch(r"(?:\.|simplclip)(?:\[([\w,]+)\])?", argument):
            for extra in extras[1].split(",") if extras[1] else ():
                assert re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE), extra
        elif parts := re.fullmatch(r"nvidia-\{([\w,-]+)\}(==.+)", argument):
            each = f'$(foreach part,{parts[1].replace(",", " ")},"nvidia-$(part){parts[2]}")'
            assert each in MAKEFILE.replace("$$($1/python", "$(python"), argument
        elif argument not in ("-e", "--no-build-isolation", "--no-deps"):
            assert f'"{argument}"' in PYPROJECT + MAKEFILE, argument


@pytest.mark.parametrize("name", FILES)
def test_paths_exist(name):
    """From the top, except those with the placeholder NAME; in pictures from the package, too."""
    top = "simplclip|kernels|csrc|benchmarks|examples|tests|docs|\\.github"
    for word in words_of(name):
        if re.fullmatch(rf"({top})/[\w./*-]*", word) and "NAME" not in word:
            assert list(ROOT.glob(word.rstrip("/"))), f"{name}: {word}"
    for first, _, text in blocks(name, "mermaid"):
        paths = re.findall(r"\b\w+(?:/\w+)*(?:/|\.py)(?!\w)", text)
        assert len(paths) > 5
        for path in paths:
            found = (ROOT / path).exists() or (ROOT / "simplclip" / path).exists()
            assert found, f"{name}:{first}: {path}"


@pytest.mark.parametrize("name", FILES)
def test_names_exist(name):
    """Modules and their names, variables SIMPLCLIP_A, and keys of a config such as `data.a`."""
    sections = "|".join(config.Config.model_fields)
    for word in words_of(name):
        if word.startswith("from simplclip"):
            exec(word, {})
        for dotted in re.findall(r"^(?:python -m )?(simplclip(?:\.\w+)+)", word):
            assert resolves(dotted), f"{name}: {dotted}"
        for variable in re.findall(r"\bSIMPLCLIP_\w+", word):
            assert variable in sources(), f"{name}: {variable}"
        for key in re.findall(rf"^(?:--set )?((?:{sections})(?:\.\w+)+)(?:=\S+|: \w+)?$", word):
            assert is_key(key), f"{name}: {key}"


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def is_key(key: str) -> bool:
    """Whether a config has the key; arguments of the loader are those that it takes."""
    if key.startswith("data.options."):
        return key.removeprefix("data.options.") in sections.LoaderOptions.__annotations__
    section: type[BaseModel] = config.Config
    for part in key.split("."):
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return True  # of a mapping, or of one of several types
        if part not in section.model_fields:
            return False
        section = section.model_fields[part].annotation
    return True


def test_context_lengths_are_those_of_the_models():
    """In the table of docs/training.md, and where a page trains one of the models."""
    table = (ROOT / "docs/training.md").read_text()
    listed = re.findall(r"^\| `([\w-]+)` \| (\d+) \|", table, re.MULTILINE)
    lengths = {name: models.tokenizer(name)([""]).shape[1] for name in models.names()}
    assert {name: int(length) for name, length in listed} == lengths
    text = (ROOT / PHOTOS).read_text()
    (model,) = re.findall(r"^model: {name: ([\w-]+)}", text, re.MULTILINE)
    assert re.findall(r"reads (\d+) tokens", text) == [str(lengths[model])]


def test_messages_of_troubleshooting_exist():
    """The parts of each message around its placeholders are in the sources."""
    text = (ROOT / "docs/troubleshooting.md").read_text()
    cells = re.findall(r"^\| `([^|]+)` \|", text, re.MULTILINE)
    assert len(cells) >= 9
    for cell in cells:
        for part in cell.split("…"):
            assert part.strip(" :';[]") in sources(), f"{cell}: {part}"


def anchors(path: Path) -> set[str]:
    """Returns anchors as GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def targets(name: str) -> list[str]:
    """Returns where the links and images of a file lead."""
    links = inline(name, "link_open", "image")
    return [link.attrs.get("href", link.attrs.get("src")) for link in links]


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name):
    for target in targets(name):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            path = (ROOT / name).parent / path if path else ROOT / name
            assert path.exists(), f"{name}: {target}"
            assert not anchor or anchor in anchors(path), f"{name}: {target}"
