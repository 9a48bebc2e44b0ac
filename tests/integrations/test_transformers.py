"""use_losses on transformers' models: the values and gradients of their own losses, and transformers' own trainer."""

import copy
import inspect

import doc_blocks
import hugging_face
import pytest
import torch
import transformers
from hugging_face import batch, model, step
from torch.utils._python_dispatch import TorchDispatchMode

import simplclip
from simplclip.integrations.transformers import OUTPUTS, use_losses
from simplclip.losses import ClipLoss, ClipPMLoss, SigLipLoss


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol)


class Shapes(TorchDispatchMode):
    """Returns the shapes of all tensors in a result."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        self.seen |= {tuple(t.shape) for t in results if isinstance(t, torch.Tensor)}
        return result


def test_every_model_is_tested():
    assert set(OUTPUTS) == set(hugging_face.NAMES)


@pytest.mark.parametrize("name", hugging_face.NAMES)
def test_values_and_gradients_are_the_models_own(name):
    theirs, inputs = model(name), batch(name, 37)
    out, gradients = step(theirs, inputs)
    with use_losses(theirs), Shapes() as shapes:
        ours, found = step(theirs, inputs)
        assert theirs.simplclip_loss.__class__ is (SigLipLoss if name.startswith("Siglip") else ClipLoss)
    close(ours.loss, out.loss)
    close(found, gradients)
    assert "logit_scale" in found
    assert type(ours) is type(out)
    assert ours.logits_per_image is ours.logits_per_text is None
    close(ours.image_embeds, out.image_embeds)
    close(ours.text_embeds, out.text_embeds)
    close(ours.vision_model_output.last_hidden_state, out.vision_model_output.last_hidden_state)
    assert (37, 37) not in shapes.seen
    assert (37, 16) in shapes.seen or (37, 32) in shapes.seen


def test_without_return_loss_and_after_undo_it_is_the_models_own_forward():
    clip, inputs = model(), batch()
    expected = clip(**inputs).logits_per_image
    replaced = use_losses(clip)
    assert torch.equal(clip(**inputs).logits_per_image, expected)
    assert torch.equal(clip(**inputs, return_loss=False).logits_per_image, expected)
    assert clip(**inputs, return_loss=True).logits_per_image is None
    replaced.undo()
    with use_losses(clip):
        replaced.undo()
        assert clip(**inputs, return_loss=True).logits_per_image is None
    assert torch.equal(clip(**inputs, return_loss=True).logits_per_image, expected)
    assert "forward" not in vars(clip)
    assert not hasattr(clip, "simplclip_loss")
    other = model()
    with pytest.raises(KeyError), use_losses(other):
        raise KeyError
    assert other(**inputs, return_loss=True).logits_per_image is not None


def test_a_loss_with_parameters_is_part_of_the_model_until_it_is_undone():
    clip, inputs = model(), batch()
    with use_losses(clip):
        with use_losses(clip, ClipPMLoss(pm_weight=0.5)):
            out, gradients = step(clip, inputs)
            embeds = out.image_embeds, out.text_embeds
            close(out.loss, clip.simplclip_loss(*embeds, clip.logit_scale.exp()))
            assert gradients["simplclip_loss.plane_weight"] != 0
        assert type(clip.simplclip_loss) is ClipLoss
        close(step(clip, inputs)[0].loss, ClipLoss()(*embeds, clip.logit_scale.exp()))


def test_positional_arguments_tuples_copies_and_signature():
    clip, inputs = model(), batch()
    with use_losses(clip):
        loss = clip(**inputs, return_loss=True).loss
        arguments = inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
        close(clip(*arguments, None, True).loss, loss)
        found = clip(*arguments, return_loss=True, return_dict=False)
        assert isinstance(found, tuple)
        assert len(found) == 5
        close(found[0], loss)
        assert inspect.signature(clip.forward) == inspect.signature(model().forward)
        twin = copy.deepcopy(clip)
    with torch.no_grad():
        twin.logit_scale.zero_()
        close(twin(**inputs, return_loss=True).loss, ClipLoss()(*found[2:0:-1], torch.tensor(1.0)))
    assert clip(**inputs, return_loss=True).logits_per_image is not None


@pytest.mark.slow
def test_compiles_without_graph_breaks_and_under_autocast():
    for name in ("CLIPModel", "SiglipModel"):
        clip, inputs = model(name), batch(name)
        with torch.autocast("cpu", torch.bfloat16):
            expected = clip(**inputs, return_loss=True).loss
        with use_losses(clip):
            if name == "CLIPModel":
                compiled = torch.compile(clip, fullgraph=True, backend="eager")
                close(compiled(**inputs, return_loss=True).loss, clip(**inputs, return_loss=True).loss)
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(clip(**inputs, return_loss=True).loss, expected.float(), rtol=1e-2, atol=1e-2)


def test_errors_name_the_argument(monkeypatch):
    clip, inputs = model(), batch()
    with pytest.raises(TypeError, match="model: expected one of transformers' AltCLIPModel, .*, got Linear"):
        use_losses(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model: expected one of .*, got CLIPTextModel"):
        use_losses(clip.text_model)
    with pytest.raises(TypeError, match="loss: expected a module, .*, got function"):
        use_losses(clip, lambda image, text, scale: 0)
    with use_losses(clip), pytest.raises(ValueError, match="pixel_values: expected as many images as texts .*, 6, got 5"):
        clip(**inputs | {"pixel_values": inputs["pixel_values"][:5]}, return_loss=True)
    clip.forward = clip.forward
    with pytest.raises(ValueError, match="model: expected the forward of its class"):
        use_losses(clip)
    functions = use_losses, simplclip.simplify
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.1")
    for function in functions:
        with pytest.raises(ValueError, match="model: expected a model of transformers 5.0 or later, got version 4.57.1"):
            function(clip)


def train(clip, folder, **options):
    """Returns the losses that transformers' Trainer logs, and the loss of its evaluation."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=5, learning_rate=1e-3, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, save_steps=4, prediction_loss_only=True, seed=3, **options,
    )  # fmt: skip
    rows = batch(n=20)
    pairs = [{name: value[i] for name, value in rows.items()} for i in range(20)]

    def collate(rows):
        return transformers.default_data_collator(rows) | {"return_loss": True}

    trainer = transformers.Trainer(clip, arguments, data_collator=collate, train_dataset=pairs, eval_dataset=pairs)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, trainer.evaluate()["eval_loss"]


@pytest.mark.slow
def test_transformers_own_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate: pip install 'simplclip[transformers]'")
    expected, evaluated = train(model(), tmp_path / "theirs")
    assert len(expected) == 4
    clip = model()
    use_losses(clip)
    losses, found = train(clip, tmp_path / "ours")
    assert clip(**batch(), return_loss=True).logits_per_image is None
    close(torch.tensor([*losses, found]), torch.tensor([*expected, evaluated]), atol=1e-4)

    clip = model()
    use_losses(clip, ClipPMLoss(pm_weight=1.0))
    before = clip.simplclip_loss.plane_bias.item()
    train(clip, tmp_path / "matching", bf16=True, gradient_accumulation_steps=2)
    assert clip.simplclip_loss.plane_bias.item() != before
    saved = transformers.CLIPModel.from_pretrained(tmp_path / "matching" / "checkpoint-4")
    close(saved.state_dict(), {k: v for k, v in clip.state_dict().items() if "simplclip" not in k})


def test_the_example_of_the_docs():
    example = doc_blocks.run("losses.md", "In a transformers model")
    assert type(example["model"].simplclip_loss) is ClipPMLoss
    assert example["model"].simplclip_loss.plane_weight.grad is not None
