"""Commands on ranks: the results of two ranks are those of one process, byte for byte.

Each rank runs this file as well: test_commands_on_ranks.py FOLDER runs COMMANDS in FOLDER, and
writes there results-RANK.json, by name each command's exit code and its output, or the error that
ended it.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from support.data.pairs import png, write
from support.models import captioners
from support.models.open_clip_models import register_models, write_models
from support.programs import call
from support.ranks.launch import forked_ranks
from support.train import tiny

pytestmark = pytest.mark.slow
TEACHER = "--teacher open_clip:tiny --checkpoint ../tiny.bin"
COMMANDS = {
    "evaluate": "evaluate open_clip:tiny/../tiny.bin --data held=../data/train-*.tar "
    "--classnames ../names.txt --out evaluated --batch-size 10 --workers 0",
    "teacher": f"teacher ../data/train-{{0..2}}.tar --out taught {TEACHER} --precision fp32 "
    "--workers 1",
    "caption": "caption ../data/train-{2..3}.tar --out captioned --model ../blip --max-tokens 5 "
    "--n 1 --workers 0",
    # The sidecar of the second shard, the first of the second rank, is not a tar.
    "error": f"teacher ../data/train-{{3..5}}.tar --out bad {TEACHER} --sidecars ../joined "
    "--workers 0",
}


def run(folder: Path) -> dict[str, list]:
    register_models(folder.parent)
    results = {}
    with contextlib.chdir(folder):
        for name, command in COMMANDS.items():
            result = call(*command.split())
            said = result.stdout
            if result.exit_code:
                said = (result.stderr.splitlines() or [""])[-1]
            results[name] = [result.exit_code, said]
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Returns the results of one process, those of two ranks, and their folder."""
    folder = tmp_path_factory.mktemp("commands")
    write_models(folder)
    captioners.write(folder / "blip")
    for number in range(3):
        tiny.write_shard(folder / "data" / f"train-{number}.tar")
        samples = [
            ("broken", {"png": b"no", "txt": b"x"}),
            ("good", {"png": png(number), "txt": b"a good one"}),
        ]
        write(folder / "data" / f"train-{3 + number}.tar", samples)
        (folder / "joined").mkdir(exist_ok=True)
        joined = [("good", {"json": b'{"caption": "another"}'})]
        write(folder / "joined" / f"train-{3 + number}.tar", joined)
    (folder / "joined" / "train-4.tar").write_bytes(b"no tar" * 200)
    # More classes than the ten whose texts are encoded together.
    (folder / "names.txt").write_text(
        "\n".join([*tiny.COLOURS, *(f"colour {number}" for number in range(9))])
    )
    for name in ("one", "two"):
        (folder / name).mkdir()
    one = run(folder / "one")
    forked_ranks(__file__, folder / "two", check=True)
    two = [json.loads((folder / "two" / f"results-{rank}.json").read_text()) for rank in (0, 1)]
    return one, two, folder


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "error"])
def test_ranks_do_what_one_process_does(results, command):
    one, (first, second), _ = results
    assert one[command][0] == 0, one[command]
    assert first[command] == one[command]
    assert second[command] == [0, ""]


def test_files_are_the_same(results):
    one, two = ({}, {})
    for name, files in (("one", one), ("two", two)):
        folder = results[2] / name
        for path in folder.rglob("*"):
            relative = path.relative_to(folder)
            if path.is_file() and not relative.parts[0].startswith(("bad", "results-")):
                files[relative] = path.read_bytes()
    assert len(one) > 7
    assert one == two


def test_an_error_of_one_rank_ends_all(results):
    one, (first, second), _ = results
    assert one["error"][0] == 2
    assert "train-4.tar" in one["error"][1]
    code, line = one["error"]
    # the rank that fails tells it
    assert second["error"] == [code, line.replace("simplclip: ", "simplclip: rank 1: ")]
    assert first["error"][0] == 2
    assert "another rank has ended" in first["error"][1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group()
    (Path(sys.argv[1]) / f"results-{os.environ['RANK']}.json").write_text(
        json.dumps(run(Path(sys.argv[1])))
    )
