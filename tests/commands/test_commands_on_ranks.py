"""Commands under torchrun: the results of two ranks are those of one process, byte for byte."""

import json

import captioners
import pytest
import rank_commands
import tiny
import torch
from launch import torchrun
from pairs import png, write

pytestmark = pytest.mark.slow
MODEL = f"open_clip:{captioners.NAME}"
OF_FILE = f"{MODEL}/../coca.pt"
TEACHER = ["--teacher", MODEL, "--checkpoint", "../coca.pt"]
COMMANDS = {
    "evaluate": [
        *["evaluate", OF_FILE, "--data", "held=../data/train-*.tar", "--data", "captions=../data/train-1.tar"],
        *["--classnames", "../names.txt", "--out", "evaluated"],
        *["--batch-size", "10", "--workers", "2"],
    ],
    "teacher": ["teacher", "../data/train-{0..2}.tar", "--out", "taught", *TEACHER, "--precision", "fp32", "--workers", "1"],
    "caption": [
        *["caption", "../data/train-{2..3}.tar", "--out", "captioned", "--model", captioners.NAME],
        *["--checkpoint", "../coca.pt", "--max-tokens", "5", "--n", "1", "--temperature", "0.5", "--workers", "0"],
    ],
    # The sidecar of the second shard, the first of the second rank, is not a tar.
    "error": ["teacher", "../data/train-{3..5}.tar", "--out", "bad", *TEACHER, "--sidecars", "../joined", "--workers", "0"],
}


@pytest.fixture(scope="module")
def did(tmp_path_factory):
    """Returns the outputs of one process and of two ranks, and their folders."""
    folder = tmp_path_factory.mktemp("commands")
    captioners.register(folder)
    torch.save(captioners.build().state_dict(), folder / "coca.pt")
    for number in range(3):
        tiny.write_shard(folder / "data" / f"train-{number}.tar")
        samples = [("broken", {"png": b"no", "txt": b"x"}), ("good", {"png": png(number), "txt": b"a good one"})]
        write(folder / "data" / f"train-{3 + number}.tar", samples)
        (folder / "joined").mkdir(exist_ok=True)
        write(folder / "joined" / f"train-{3 + number}.tar", [("good", {"json": b'{"caption": "another"}'})])
    (folder / "joined" / "train-4.tar").write_bytes(b"no tar" * 200)
    # More classes than the ten whose texts are encoded together.
    (folder / "names.txt").write_text("\n".join([*tiny.COLOURS, *(f"colour {number}" for number in range(9))]))
    (folder / "plan.json").write_text(json.dumps(COMMANDS))
    for name in ("one", "two"):
        (folder / name).mkdir()
    one = rank_commands.said(folder / "one", COMMANDS)
    torchrun("rank_commands.py", folder / "two", folder / "plan.json", check=True)
    two = [json.loads((folder / "two" / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    return one, two, folder


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "error"])
def test_ranks_do_what_one_process_does(did, command):
    one, (first, second), _ = did
    assert one[command][0] == 0, one[command]
    assert first[command] == one[command]
    assert second[command] == [0, ""]


def test_files_are_the_same(did):
    folder = did[2]
    files = [
        {path.relative_to(folder / name): path.read_bytes() for path in (folder / name).rglob("*") if path.is_file()}
        for name in ("one", "two")
    ]
    theirs = {path: data for path, data in files[1].items() if path.parts[0] != "bad" and not path.name.startswith("said-")}
    ours = {path: data for path, data in files[0].items() if path.parts[0] != "bad"}
    assert len(ours) > 8
    assert [path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)] == []


def test_an_error_of_one_rank_ends_all(did):
    one, (first, second), _ = did
    assert one["error"][0] == 2
    assert "train-4.tar" in one["error"][1]
    assert second["error"] == one["error"]  # the rank that fails tells it
    assert first["error"] == [1, ""]
