"""Nodes that have other files under the same paths, or other settings, end before a step."""

import json
import shutil

import pytest
import torch

from support.ranks.launch import forked_ranks
from support.train import runs, tiny


def pad(tar):
    """Makes a tar longer; its samples stay."""
    with tar.open("ab") as file:
        file.write(bytes(512))


# what is changed in the second node's data, its further settings, its error
CASES = {
    "nothing": (lambda data: None, [], None),
    "setting": (
        lambda data: None,
        ["optim.weight_decay=0.5"],
        "ConfigError: optim.weight_decay: expected 0.1, as on the first rank, got 0.5; all nodes",
    ),
    "fewer shards": (
        lambda data: (data / "train-1.tar").unlink(),
        [],
        "InputError: data.train: expected train-1.tar of 51,200 bytes, as on the first rank, got "
        "no more files; all nodes need the same data",
    ),
    "shard": (
        lambda data: pad(data / "train-0.tar"),
        [],
        "InputError: data.train: expected train-0.tar of 51,200 bytes, as on the first rank, got "
        "train-0.tar of 51,712 bytes",
    ),
    "sidecar": (
        lambda data: pad(data / "teacher" / "train-1.tar"),
        [],
        "InputError: data.sidecars: expected data/teacher/train-1.tar of ",
    ),
    "held-out data": (
        lambda data: pad(data / "held.tar"),
        [],
        "InputError: eval.splits.held: expected held.tar of ",
    ),
    "weights": (
        lambda data: shutil.copy(data / "other.pt", data / "frozen.pt"),
        [],
        "InputError: inherit.source: expected the weights of the first rank, got others in visual.",
    ),
}


@pytest.mark.slow
def test_other_files_or_settings_of_a_node(tmp_path):
    for tar in ("train-0.tar", "train-1.tar", "held.tar"):
        tiny.write_shard(tmp_path / "data" / tar, teacher=16)
    tiny.write_config(tmp_path, teacher=16)
    weights = runs.save_run(tmp_path / "weights", "siclip-tiny", **tiny.MODEL).state_dict()
    torch.save(weights, tmp_path / "data" / "frozen.pt")
    others = {name: weight + 1 for name, weight in weights.items()}
    torch.save(others, tmp_path / "data" / "other.pt")
    always = [
        "data.train=data/train-*.tar",
        "data.sidecars=[data/teacher]",
        "eval.splits.held=data/held.tar",
        "eval.every=10",
        "inherit.source=data/frozen.pt",
        "run.steps=1",
    ]
    plan = {}
    for name, (change, changes, _) in CASES.items():
        node = tmp_path / "nodes" / name
        shutil.copytree(tmp_path / "data", node / "data")
        change(node / "data")
        out = f"run.out={tmp_path / 'runs' / name}"
        plan[name] = {"changes": [*always, out], "second": [str(node), changes]}
    (tmp_path / "runs").mkdir()
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    forked_ranks("training.py", tmp_path, "plan", check=True)
    first, second = (json.loads((tmp_path / f"plan-{rank}.json").read_text()) for rank in (0, 1))
    assert first.pop("nothing")["error"] is second.pop("nothing")["error"] is None
    for name, result in second.items():
        assert result["error"].startswith(CASES[name][2]), name
        assert first[name]["error"] == "SystemExit: 1"
        assert not (tmp_path / "runs" / name).exists(), "nothing is written"
