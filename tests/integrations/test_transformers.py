"""docs/recipes.md for transformers' Trainer: the models' own losses, and one that learns."""

import pytest
import torch
import transformers

from simplclip.losses import ClipLoss, ClipPMLoss, SigLipLoss
from support.models.hugging_face import batch, model
from support.programs import run_doc_blocks

pytest.importorskip(
    "accelerate",
    reason="transformers.Trainer needs accelerate: pip install 'simplclip[transformers]'",
)


@pytest.fixture(scope="module")
def recipe():
    return run_doc_blocks("recipes.md", "In transformers' Trainer")


def train(kind, clip, folder, name="CLIPModel", **options):
    """Returns the losses that the Trainer logs, and the loss of its evaluation."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=5,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_steps=4,
        prediction_loss_only=True,
        seed=3,
        **options,
    )
    rows = batch(name, n=20)
    pairs = [dict(zip(rows, values)) for values in zip(*rows.values())]

    def collate(rows):
        return transformers.default_data_collator(rows) | {"return_loss": True}

    trainer = kind(clip, arguments, data_collator=collate, train_dataset=pairs, eval_dataset=pairs)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return torch.tensor([*losses, trainer.evaluate()["eval_loss"]])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "loss"), [("CLIPModel", ClipLoss), ("SiglipModel", SigLipLoss)])
def test_each_step_is_that_of_the_models_own_loss(recipe, tmp_path, name, loss):
    expected = train(transformers.Trainer, model(name), tmp_path / "theirs", name)
    clip = model(name)
    clip.simplclip_loss = loss()
    losses = train(recipe["ContrastiveTrainer"], clip, tmp_path / "ours", name)
    assert len(expected) == 5
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_a_loss_that_learns_is_trained_and_saved(recipe, tmp_path):
    assert type(recipe["model"].simplclip_loss) is ClipPMLoss
    clip = model()
    clip.simplclip_loss = ClipPMLoss(pm_weight=1.0)
    before = clip.simplclip_loss.plane_bias.item()
    options = {"bf16": True, "gradient_accumulation_steps": 2}
    train(recipe["ContrastiveTrainer"], clip, tmp_path / "out", **options)
    assert clip.simplclip_loss.plane_bias.item() != before
    saved = transformers.CLIPModel.from_pretrained(tmp_path / "out" / "checkpoint-4")
    expected = {name: value for name, value in clip.state_dict().items() if "simplclip" not in name}
    torch.testing.assert_close(saved.state_dict(), expected)
