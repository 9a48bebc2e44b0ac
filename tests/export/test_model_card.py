"""Model cards: with held-out figures of these weights or the command that measures them, counts,
sources, settings, and licences to be filled in.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from simplclip import export, model_card
from simplclip.models.trained import load_model
from support.models.exported_models import VIT
from support.train.runs import save_run

SHARES = {f"R@{k}": {"value": k / 16, "chance": k / 1000} for k in (1, 5, 10)}
HELD = {"image_to_text": SHARES, "text_to_image": SHARES, "zero_shot": None}
UNMEASURED = "there are no held-out figures"
CARD = "README.md"


class Trained(NamedTuple):
    run: Path
    model: torch.nn.Module
    state: dict

    def card(self, **sections) -> str:
        """Returns the card; sections: in place of values of the run's config."""
        config = self.state["config"]
        for name, values in sections.items():
            config = config | {name: config[name] | values}
        return model_card.card(self.model, self.state | {"config": config}, self.run, "")

    def write_results(self, checkpoint="best.pt", step=7, **splits) -> None:
        results = {"checkpoint": str(self.run / checkpoint), "step": step, "splits": splits}
        (self.run / "evaluation.json").write_text(json.dumps(results))


@pytest.fixture
def trained(tmp_path):
    save_run(tmp_path / "run", "siclip-tiny")
    model, state = load_model(tmp_path / "run")
    return Trained(tmp_path / "run", model, state | {"images": 841})


@pytest.mark.slow
def test_a_card_of_a_run_that_was_evaluated(trained, tmp_path):
    torch.save(trained.state, trained.run / "best.pt")
    top = {"value": 0.5, "chance": 0.25}
    labels = {"zero_shot": {"top1": top, "top5": top, "mean_per_class": top}}
    trained.write_results(held=HELD, things=labels)
    out = tmp_path / "out"
    export.run(trained.run, out)
    card = ModelCard.load(out / CARD)
    assert card.data.library_name == "open_clip"
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found["held", "image to text R@5"] == 5 / 16
    assert found["things", "zero shot top1"] == 0.5
    assert len(found) == 9
    lines = card.text.splitlines()
    assert "- held, text to image R@1: 6.2% (chance 0.1%)" in lines
    assert "- things, zero shot mean per class: 50.0% (chance 25.0%)" in lines
    parameters = sum(p.numel() for p in trained.model.parameters())
    assert f"of {parameters:,} parameters, trained to step 7 by simplclip" in card.text
    assert "- Started from: random weights" in lines
    assert "- Images in an epoch: 841" in lines
    assert f"    encoder = simplclip.load({str(out)!r})" in lines
    assert "    register_models()" in lines
    (out / CARD).write_text("my card")  # e.g. with a licence
    export.run(trained.run, out, force=True)
    assert (out / CARD).read_text() == "my card"


@pytest.mark.slow
def test_figures_of_another_checkpoint_or_a_damaged_file_are_not_the_models(trained):
    assert UNMEASURED in trained.card()
    trained.write_results(step=6, held=HELD)
    assert UNMEASURED in trained.card()
    for damaged in ("[1]", "{"):
        (trained.run / "evaluation.json").write_text(damaged)
        assert UNMEASURED in trained.card()


@pytest.mark.slow
def test_a_card_names_its_start_and_settings_without_folders_and_secrets(trained):
    train = ["/home/me/a/0.tar", {"shards": "pipe:get --key secret", "weight": 2.0}]
    text = trained.card(
        data={"train": train, "sidecars": ["/home/me/b/teacher"]},
        inherit={"source": ["efficientnet-lite0", "/home/me/weights.pt"]},
        optim={"lr": 0.5, "grad_clip": None},
    )
    assert "- Started from: efficientnet-lite0, me/weights.pt\n" in text
    settings = yaml.safe_load(text.split("```")[1].removeprefix("yaml"))
    assert (settings["optim"]["lr"], settings["optim"]["grad_clip"]) == (0.5, None)
    assert "secret" not in text
    assert "/home" not in text


@pytest.mark.slow
def test_a_card_for_transformers(tmp_path):
    save_run(tmp_path / "vit", f"open_clip:{VIT}")
    export.run(tmp_path / "vit", tmp_path / "out", to="transformers")
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert card.data.library_name == "transformers"
    assert "    from transformers import AutoModel, AutoProcessor" in card.text.splitlines()
