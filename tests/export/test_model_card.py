"""Model cards: with held-out figures of these weights or the command that measures them, counts,
sources, settings, and licences to be filled in.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import simplclip
from simplclip import export, model_card
from simplclip.evaluation import Classification, Figure, Results, SplitResult
from simplclip.models.trained import load_model
from simplclip.train.config import from_dict
from support.data.pairs import table
from support.models.exported_models import VIT
from support.train.runs import save_run

SHARES = {f"R@{k}": Figure(value=k / 16, chance=k / 1000) for k in (1, 5, 10)}
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
        results = Results(
            checkpoint=str(self.run / checkpoint),
            model="siclip-tiny",
            step=step,
            precision="fp32",
            versions={"simplclip": "0.0.9"},
            splits=splits,
        )
        (self.run / "evaluation.json").write_text(results.model_dump_json())


@pytest.fixture
def trained(tmp_path):
    save_run(tmp_path / "run", "siclip-tiny")
    model, state = load_model(tmp_path / "run")
    return Trained(tmp_path / "run", model, state | {"images": 841})


def lines_of(text: str, heading: str) -> list[str]:
    """Returns the lines that are not empty of a section of a card."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line]


@pytest.mark.slow
def test_a_card_of_a_run_that_was_evaluated(trained, tmp_path):
    torch.save(trained.state, trained.run / "best.pt")
    held = SplitResult(images=9, texts=12, image_to_text=SHARES, text_to_image=SHARES)
    top = Figure(value=0.5, chance=0.25)
    labels = Classification(
        classes=[*"abcd"], images=3, templates=["{}"], top1=top, top5=top, mean_per_class=top
    )
    trained.write_results(held=held, things=SplitResult(images=3, texts=0, zero_shot=labels))
    out = tmp_path / "out"
    export.run(trained.run, out)
    text = (out / CARD).read_text("utf-8")
    assert text.startswith("---\nlibrary_name: open_clip\n")
    assert "\n# license: to be filled in by you" in text.split("\n---\n")[0]
    assert "\n# siclip-tiny\n" in text
    assert f"{sum(p.numel() for p in trained.model.parameters()):,} parameters" in text
    assert lines_of(text, "Figures") == [
        "Measured by simplclip 0.0.9 in fp32. Held-out data: held: 9 images, 12 captions; "
        "things: 3 images.",
        "| data | direction | R@1 (chance) | R@5 (chance) | R@10 (chance) |",
        "|---|---|--:|--:|--:|",
        "| held | image to text | 6.2% (0.1%) | 31.2% (0.5%) | 62.5% (1.0%) |",
        "| held | text to image | 6.2% (0.1%) | 31.2% (0.5%) | 62.5% (1.0%) |",
        "| data | classes | top 1 (chance) | top 5 (chance) | mean per class (chance) |",
        "|---|---|--:|--:|--:|",
        "| things | 4 | 50.0% (25.0%) | 50.0% (25.0%) | 50.0% (25.0%) |",
    ]
    assert lines_of(text, "Training data") == [
        "- 841 images in an epoch",
        "- 7 steps of 256 images with a caption each: 1,792 pairs were seen",
        "- Sources: `x.tar`",
    ]
    assert lines_of(text, "How it was made") == [
        f"Exported from step 7 by simplclip {simplclip.__version__} with torch "
        f"{torch.__version__}.",
        "The settings of its training are the defaults.",
    ]
    assert lines_of(text, "Licence")[1:] == [
        "- Model: (licence). It started from random weights.",
        "- Data: (licence of the images and of the captions). Sources: `x.tar`.",
    ]
    use = lines_of(text, "Use")
    assert "To load it in open_clip, with simplclip installed:" in use
    assert "    register_models()" in use
    assert f'    encoder = simplclip.load("{out}")' in use
    (out / CARD).write_text("my card")  # e.g. with a licence
    export.run(trained.run, out, force=True)
    assert (out / CARD).read_text() == "my card"


@pytest.mark.slow
def test_a_card_of_a_run_that_was_not_evaluated(trained):
    """Figures of another step or checkpoint are not this model's, and a damaged file has none."""
    assert UNMEASURED in trained.card()
    command = f"    simplclip evaluate {trained.run}"
    assert f"{command} --data NAME=DATA" in lines_of(trained.card(), "Figures")
    for held_out in ({"hold_out": 0.1}, {"splits": {"test": "test.tar"}}):
        assert command in lines_of(trained.card(eval=held_out), "Figures")
    held = SplitResult(images=9, texts=9, image_to_text=SHARES, text_to_image=SHARES)
    trained.write_results(step=6, held=held)
    assert UNMEASURED in trained.card()
    for damaged in ("[1]", "{"):
        (trained.run / "evaluation.json").write_text(damaged)
        assert UNMEASURED in trained.card()


@pytest.mark.slow
def test_a_card_has_what_the_run_found_at_its_step(trained):
    columns = ["step", "split", "direction", "R@1", "R@5", "R@10", "loss"]
    columns += ["chance R@1", "chance R@5", "chance R@10"]
    found = [
        [6, "held_out", "image_to_text", 0.1, 0.1, 0.1, 1.0, 0.1, 0.1, 0.1],
        [7, "held_out", "text_to_image", 0.25, 0.5, 0.75, 1.0, 0.01, 0.05, 0.1],
    ]
    table(trained.run / "evaluation.csv", found, columns)
    lines = lines_of(trained.card(), "Figures")
    assert lines[0] == "Measured by the run itself, on held-out data."
    row = "| held_out | text to image | 25.0% (1.0%) | 50.0% (5.0%) | 75.0% (10.0%) |"
    assert lines[3:] == [row]


@pytest.mark.slow
def test_a_card_names_sources_and_settings_without_folders_and_secrets(trained):
    packed = [f"/home/me/runs/a/shards/photos/{number}.tar" for number in range(3)]
    addresses = ["https://me:secret@host/set/{00..10}.tar?key=secret", "pipe:get --key secret"]
    train = [*packed, {"shards": "/home/me/cc3m/{0..9}.tar", "weight": 2.0}, *addresses]
    text = trained.card(
        data={"train": train, "captions_per_image": 2, "sidecars": ["/home/me/b/teacher"]},
        inherit={"source": ["efficientnet-lite0", "/home/me/weights.pt"]},
        optim={"lr": 0.5, "grad_clip": None, "layer_decay": 0.8},
        eval={"hold_out": 0.125},
    )
    names = "`photos`, `cc3m/{0..9}.tar`, `host/set/{00..10}.tar`, `the output of a command`"
    assert lines_of(text, "Training data")[1:] == [
        "- 7 steps of 256 images with 2 captions each: 3,584 pairs were seen",
        f"- Sources: {names}",
        "- Stored beside them: `b/teacher`",
        "- Held out of them, not trained on: 12.5%",
    ]
    assert lines_of(text, "Licence")[1:] == [
        "- Model: (licence). It started from `efficientnet-lite0`, `me/weights.pt`.",
        f"- Data: (licence of the images and of the captions). Sources: {names}.",
    ]
    assert lines_of(text, "How it was made")[2:] == [
        "    data.captions_per_image: 2",
        "    optim.lr: 0.5",
        "    optim.layer_decay: 0.8",
        "    optim.grad_clip: null",
        "    eval.hold_out: 0.125",
    ]
    assert "secret" not in text
    assert "/home" not in text
    many = model_card.names_of([f"a/{number}.tar" for number in range(12)])
    assert trained.card(data={"train": many}).count("`a/9.tar` and 2 more") == 2


@pytest.mark.slow
def test_a_card_says_what_is_unknown(trained):
    """A checkpoint of another version, whose settings this one does not have."""
    del trained.state["images"]
    text = trained.card(data={"of_old": 1})
    assert lines_of(text, "Training data") == ["- The number of images was not recorded."]
    assert lines_of(text, "Licence")[1].endswith("It started from weights that are unknown.")
    assert lines_of(text, "Licence")[2].endswith("Sources: unknown.")
    unknown = "Its settings are those of another version of simplclip."
    assert lines_of(text, "How it was made")[1:] == [unknown]
    from_dict(trained.state["config"])


@pytest.mark.slow
def test_a_card_for_transformers(tmp_path):
    save_run(tmp_path / "run", f"open_clip:{VIT}")
    export.run(tmp_path / "run", tmp_path / "out", to="transformers")
    text = (tmp_path / "out" / CARD).read_text("utf-8")
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert UNMEASURED in text
    assert "    from transformers import AutoModel, AutoProcessor" in lines_of(text, "Use")
