"""Nodes that have other files under the same paths, or other settings, end before a step."""

import json
import shutil

import pytest
import torch

from support.ranks.launch import forked_ranks
from support.train import runs, tiny

ALIKE = "as on the first rank, got"
# by what differs in the second node, at last a file, which is longer but has the same samples
ERRORS = {
    "setting": f"ConfigError: optim.weight_decay: expected 0.1, {ALIKE} 0.5; all nodes",
    "fewer": f"InputError: data.train: expected train-1.tar of 51,200 bytes, {ALIKE} no more files;"
    " all nodes need the same data",
    "weights": "InputError: inherit.source, model.checkpoint: expected the weights of the first "
    "rank, got others in ",
    "train-0.tar": f"InputError: data.train: expected train-0.tar of 51,200 bytes, {ALIKE} "
    "train-0.tar of 51,712 bytes",
    "teacher/train-1.tar": "InputError: data.sidecars: expected data/teacher/train-1.tar of ",
    "held.tar": "InputError: eval.splits.held: expected held.tar of ",
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
    for number, name in enumerate(["nothing", *ERRORS]):
        node = tmp_path / "nodes" / str(number)
        data = node / "data"
        shutil.copytree(tmp_path / "data", data)
        if name == "fewer":
            (data / "train-1.tar").unlink()
        elif name == "weights":
            shutil.copy(data / "other.pt", data / "frozen.pt")
        elif name.endswith(".tar"):
            (data / name).write_bytes((data / name).read_bytes() + bytes(512))
        changes = ["optim.weight_decay=0.5"] if name == "setting" else []
        out = f"run.out={tmp_path / 'runs' / str(number)}"
        plan[name] = {"changes": [*always, out], "second": [str(node), changes]}
    (tmp_path / "runs").mkdir()
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    forked_ranks("training.py", tmp_path, "plan", check=True)
    first, second = (json.loads((tmp_path / f"plan-{rank}.json").read_text()) for rank in (0, 1))
    assert first.pop("nothing")["error"] is second.pop("nothing")["error"] is None
    for number, (name, message) in enumerate(ERRORS.items(), 1):
        assert second[name]["error"].startswith(message)
        assert first[name]["error"] == "SystemExit: 1"
        assert not (tmp_path / "runs" / str(number)).exists(), "nothing is written"
