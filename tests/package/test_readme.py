"""README.md, CONTRIBUTING.md and docs/: their examples run, and the names in them exist.

    python   the blocks of one file run in order, as one program, and use no deprecated name
    sh       a line is a command of a kind below; its targets, options, settings, extras and files exist. Commands that take
             only seconds are run as well
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
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from markdown_it import MarkdownIt
from pairs import forked
from paths import ROOT

from simplclip import export
from simplclip import train as trainer

FILES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
QUICK = ("make help", "make check-tools", "simplclip doctor", "simplclip train --help-config")
QUICK += ("python -m benchmarks.tables --check",)
SYSTEM_PACKAGES = ("git", "make", "fonts-noto-color-emoji", "google-noto-color-emoji-fonts")


def tokens(name: str):
    return MarkdownIt().enable("table").parse((ROOT / name).read_text())


def blocks(name: str, language: str) -> list[tuple[int, str]]:
    """Returns the file's blocks in this language, each as its first line number and its text."""
    return [(t.map[0] + 2, t.content) for t in tokens(name) if t.type == "fence" and t.info == language]


def commands() -> list:
    """Returns every command of the shell blocks: file and line number, and words."""
    found = []
    for name in FILES:
        for first, text in blocks(name, "sh"):
            joined = re.sub(r"\\\n\s*", lambda match: " " * len(match[0]), text)
            for line in joined.splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found.append(pytest.param(name, words, id=f"{name}:{first} {' '.join(words)[:60]}"))
    return found


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


@pytest.mark.parametrize("name", FILES)
def test_every_block_is_of_a_kind_that_is_tested(name):
    kinds = {(t.type, t.info) for t in tokens(name) if t.type in ("fence", "code_block")}
    assert kinds <= {("fence", language) for language in ("python", "sh", "yaml", "mermaid", "text")}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if blocks(name, "python")])
def test_python_blocks_run(name, tmp_path):
    """The blocks keep their line numbers, so that a traceback points into the document."""
    lines: list[str] = []
    for first, text in blocks(name, "python"):
        lines += [""] * (first - 1 - len(lines)) + text.splitlines()
    if name in ("README.md", "docs/training.md"):
        trained(tmp_path)
    program = tmp_path / Path(name).with_suffix(".py").name
    program.write_text("\n".join(lines) + "\n")

    def run():
        os.chdir(tmp_path)
        warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
        with open("told", "w") as told, contextlib.redirect_stderr(told):
            try:
                runpy.run_path(str(program), run_name="__main__")
            except BaseException:
                traceback.print_exc()
                raise

    assert forked(run) == 0, f"{name}: {(tmp_path / 'told').read_text()[-3000:]}"


def trained(folder: Path) -> None:
    """Makes the run, the export and the images that the programs read."""
    out = folder / "runs" / "siclip-lite0-emoji"
    trainer.run(tiny.settings(folder, "run.steps=1", f"run.out={out}"))
    export.run(out, folder / "export")
    for name in ("cat.jpg", "car.jpg"):
        (folder / name).write_bytes(tiny.picture(tiny.COLOURS["red"], "ring"))


@pytest.mark.parametrize(("name", "words"), commands())
def test_commands_exist(name, words, tmp_path, monkeypatch):
    for _, text in blocks(name, "yaml"):
        (tmp_path / text.partition("\n")[0].removeprefix("# ")).write_text(text)
    monkeypatch.chdir(tmp_path)
    check_command(list(words))


def check_command(words: list[str]) -> None:
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        variable = words.pop(0).partition("=")[0]
        assert variable in sources(), variable
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "torchrun":
        assert arguments[0] == "--nproc-per-node"
        program, arguments = "python", arguments[2:]
    if program == "python" and arguments[:1] == ["-m"]:
        program, arguments = arguments[1], arguments[2:]
    if program == "python" and arguments[0].startswith("examples/"):
        return check_script(ROOT / arguments[0], arguments[1:])
    checks = {
        "make": check_make,
        "simplclip": check_simplclip,
        "simplclip-open-clip": check_open_clip_train,
        "simplclip.integrations.open_clip_train": check_open_clip_train,
        "pip": check_pip,
        "pytest": check_pytest,
        "sudo": check_system_packages,
        "git": lambda rest: None,
        "cd": lambda rest: None,
        "tar": lambda rest: None,
        "pre-commit": lambda rest: None,
    }
    if program == "benchmarks.ablation":
        check_ablation(arguments)
    elif program.startswith("benchmarks."):
        path = ROOT / program.replace(".", "/")
        check_script(path / "__main__.py" if path.is_dir() else path.with_suffix(".py"), arguments)
    else:
        assert program in checks, f"{program}: expected one of {sorted(checks)}"
        checks[program](arguments)


def check_script(path: Path, arguments: list[str]) -> None:
    text = path.read_text()
    assert all(argument in text for argument in arguments if argument.startswith("-"))


@functools.cache
def sources() -> str:
    """Returns the text of all files that may read an environment variable."""
    files = [ROOT / "setup.py", *(ROOT / "simplclip").rglob("*.py"), *(ROOT / "csrc").rglob("*.[ch]*")]
    return MAKEFILE + "".join(path.read_text() for path in files)


def check_make(arguments: list[str]) -> None:
    for argument in arguments:
        variable, assigned, _ = argument.partition("=")
        if assigned:
            assert re.search(rf"\$\((or \$\()?{variable}\)|^{variable} ", MAKEFILE, re.MULTILINE), argument
        else:
            assert re.search(rf"^{argument}:", MAKEFILE, re.MULTILINE), argument


def check_simplclip(arguments: list[str]) -> None:
    """Parses a command by the command line's parser without running it, and reads the config's settings."""
    from typer.main import get_command

    from simplclip.commands.main import app
    from simplclip.train import config

    seen = {}

    def quiet(command):
        for child in getattr(command, "commands", {}).values():
            quiet(child)
        if not hasattr(command, "commands"):
            command.callback = lambda **values: seen.update(values)

    parser = get_command(app)
    quiet(parser)
    parser.main(arguments, standalone_mode=False)
    source = seen.get("config")
    if source is not None:
        config.load(ROOT / source if source.startswith("examples/") else source, seen.get("set_") or ())


def check_ablation(arguments: list[str]) -> None:
    from benchmarks.ablation import __main__, effects

    options = __main__.parser().parse_args(arguments)
    file = effects.load(options.effects)
    assert all(effects.trials(file, effect, 0, options.config, options.set) for effect in file.effects)


def check_open_clip_train(arguments: list[str]) -> None:
    from open_clip_train.params import parse_args

    from simplclip.integrations import open_clip_train

    parser = open_clip_train.parser()
    options, theirs = parser.parse_known_args(arguments)
    open_clip_train._check(parser, options, parse_args(theirs))


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    for argument in arguments[1:]:
        extras = re.fullmatch(r"(?:\.|simplclip)(?:\[([\w,]+)\])?", argument)
        assert extras or argument in ("-e", "--no-build-isolation"), argument
        for extra in extras[1].split(",") if extras and extras[1] else ():
            assert re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE), extra


def check_pytest(arguments: list[str]) -> None:
    for argument in arguments:
        if argument.startswith("tests"):
            assert (ROOT / argument.partition("::")[0]).exists(), argument


def check_system_packages(arguments: list[str]) -> None:
    manager, install, *packages = arguments
    assert (manager, install) in (("apt", "install"), ("dnf", "install"))
    stems = {re.sub("^python3", "$(PYTHON_PACKAGE)", package): package for package in packages}
    for stem, package in stems.items():
        assert stem in MAKEFILE.split("define CHECK_TOOLS")[1].split("endef")[0] or package in SYSTEM_PACKAGES, package


def test_readme_lists_every_package_that_make_asks_for():
    asked = re.findall(r'missing "[^"]*" (\S+) (\S+)', MAKEFILE.replace("$(PYTHON_PACKAGE)", "python3"))
    assert len(asked) == 5
    lines = [words for name, words in (param.values for param in commands()) if name == "README.md"]
    listed = {words[1]: words for words in lines if words[0] == "sudo"}
    for apt, dnf in asked:
        if apt != "python3.12":  # an example of a newer Python
            assert apt in listed["apt"]
            assert dnf in listed["dnf"]


@pytest.mark.slow
def test_quick_commands_run():
    lines = {" ".join(words) for _, words in (param.values for param in commands())}
    wanted = [line for line in QUICK if line in lines]
    assert len(wanted) >= 3
    for line in wanted:
        line = re.sub("^simplclip", f"{sys.executable} -m simplclip", re.sub("^python", sys.executable, line))
        run = subprocess.run(shlex.split(line), cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, f"{line}: {run.stderr}"


@pytest.mark.slow
def test_the_example_of_a_folder_of_photos_runs(tmp_path):
    """The shell block and the config of the section run unchanged."""
    section = (ROOT / "docs" / "examples.md").read_text().split("\n## A folder of photos")[1].split("\n## ")[0]
    shell, config = re.findall(r"```(?:sh|yaml)\n(.*?)```", section, re.DOTALL)
    (tmp_path / "photos.yaml").write_text(config)
    (tmp_path / "photos").mkdir()
    for shape in tiny.SHAPES:
        for name, colour in tiny.COLOURS.items():
            (tmp_path / "photos" / f"{name}-{shape}.png").write_bytes(tiny.picture(colour, shape))
            (tmp_path / "photos" / f"{name}-{shape}.txt").write_text(f"a {name} {shape}\n")
    run_block(shell, tmp_path)
    assert len(np.load(tmp_path / "photos.npz")["features"]) == 24
    assert (tmp_path / "hits.png").stat().st_size > 0


def run_block(shell: str, folder: Path) -> list[str]:
    """Runs a block's commands in the folder, in forks of this process, which has the modules; returns each one's output."""
    from simplclip.commands.main import main

    printed, told = folder / "printed", folder / "told"

    def run(words: list[str]) -> None:
        os.chdir(folder)
        with open(told, "w") as errors, open(printed, "w") as output, contextlib.redirect_stderr(errors):
            try:
                with contextlib.redirect_stdout(output):
                    assert not main(words, standalone_mode=False)
            except BaseException:
                traceback.print_exc()
                raise

    outputs = []
    for line in shell.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line)
        if program == "simplclip":
            assert forked(functools.partial(run, words)) == 0, f"{line}: {told.read_text()[-3000:]}"
            outputs.append(printed.read_text())
        elif program == "python":
            subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=folder, check=True)
        else:
            subprocess.run([program, *words], cwd=folder, check=True)
    return outputs


@pytest.mark.slow
def test_the_recipe_of_a_start_from_trained_weights_runs(tmp_path):
    """The shell block of the section runs unchanged, with a small config."""
    section = (ROOT / "docs" / "training.md").read_text().split("\n## Start from trained weights")[1].split("\n## ")[0]
    (shell,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    values = yaml.safe_load(Path(tiny.write_config(tmp_path)).read_text())
    values["run"] |= {"out": "runs/my", "steps": 3}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(values))
    tiny.write_shard(tmp_path / "held" / "held-0.tar")
    first, second, *_ = run_block(shell, tmp_path)
    assert "weights from" not in first
    assert re.search(r"visual.trunk.pos_embed +resized", second)
    assert re.search(r"total +loaded", second)
    assert (tmp_path / "finer" / "evaluation.json").exists()


def words_of(name: str) -> list[str]:
    """Returns the text in backticks outside of blocks."""
    inline = [child for t in tokens(name) if t.type == "inline" for child in t.children]
    return [child.content for child in inline if child.type == "code_inline"]


@pytest.mark.parametrize("name", FILES)
def test_paths_exist(name):
    """Paths in backticks exist from the top, except those with the placeholder NAME; in pictures from the package, too."""
    top = "simplclip|kernels|csrc|benchmarks|examples|tests|docs|\\.github"
    for word in words_of(name):
        if re.fullmatch(rf"({top})/[\w./*-]*", word) and "NAME" not in word:
            assert list(ROOT.glob(word.rstrip("/"))), f"{name}: {word}"
    for first, text in blocks(name, "mermaid"):
        found = re.findall(r"\b\w+(?:/\w+)*(?:/|\.py)(?!\w)", text)
        assert len(found) > 5
        for path in found:
            assert (ROOT / path).exists() or (ROOT / "simplclip" / path).exists(), f"{name}:{first}: {path}"


@pytest.mark.parametrize("name", FILES)
def test_names_exist(name):
    """`simplclip.a.b` is a module or a name in one, and `SIMPLCLIP_A` a variable that is read somewhere."""
    for word in words_of(name):
        for dotted in re.findall(r"^(?:python -m )?(simplclip(?:\.\w+)+)", word):
            assert resolves(dotted), f"{name}: {dotted}"
        for variable in re.findall(r"\bSIMPLCLIP_\w+", word):
            assert variable in sources(), f"{name}: {variable}"


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def anchors(path: Path) -> set[str]:
    """Returns anchors as GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name):
    inline = [child for t in tokens(name) if t.type == "inline" for child in t.children]
    targets = [child.attrs.get("href", child.attrs.get("src")) for child in inline if child.type in ("link_open", "image")]
    for target in targets:
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            path = (ROOT / name).parent / path if path else ROOT / name
            assert path.exists(), f"{name}: {target}"
            assert not anchor or anchor in anchors(path), f"{name}: {target}"
