"""siclip-s0: MobileCLIP-S0 with simplified blocks, as in the paper."""

import pytest
import torch

from simplclip import models
from simplclip.train import config, loop
from simplclip.train.setup import make_state
from simplclip.train.step import train_step
from support.models.mobileclip_s0 import all_tokens, weights
from support.models.weights import with_statistics
from support.train import tiny


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return models.create("siclip-s0").eval()


@pytest.mark.slow
def test_the_image_encoder_has_a_seventh_less_parameters(student):
    before, after = student.simplify_report.before, student.simplify_report.after
    assert before["image"] == 11_406_464
    assert abs(after["image"] / 9.78e6 - 1) < 0.005
    assert round(after["image"] / before["image"] - 1, 3) == -0.143
    assert (before["text"], after["text"]) == (42_441_216, 40_331_880)


def stand_in(name):
    """Returns weights made from a seed in the layout of the config's inherit.source."""
    torch.manual_seed(1)
    if name == "siclip-s0":
        return weights(1)
    return with_statistics(models.create(name, simplified=False)).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siclip-s0", pytest.param("siclip2-s0", marks=pytest.mark.prove)])
def test_a_training_step_of_the_config(name, tmp_path):
    """With all terms of the last stage, by cached gradients: only what is not frozen moves."""
    torch.save(stand_in(name), tmp_path / "source.pt")
    shard = tiny.write_shard(tmp_path / "train-0.tar", teacher=64)
    data = [f"data.train={shard}", f"data.sidecars=[{tmp_path / 'teacher'}]", "data.workers=0"]
    data += ["data.batch_size=4", "data.micro_batch=2", "model.image_size=64"]
    changes = [*data, f"inherit.source={tmp_path / 'source.pt'}", "run.precision=fp32"]
    state = make_state(config.load(name, changes), torch.device("cpu"), "fp32")
    assert len(state.prepared.frozen) > 8
    state.step = 20_000
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    loader = iter(loop.make_loader(state))
    row = train_step(state, [next(loader) for _ in range(2)])
    terms = ("contrastive", "pair_matching", "feature", "relational", "interactive")
    assert all(0 < float(row[f"{term}_loss"]) < 1e3 for term in terms), row
    after = state.model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    named = state.model.named_parameters(remove_duplicate=False)
    assert moved == {name for name, parameter in named if parameter.requires_grad}


def test_the_last_blocks_mlp_computes_one_token_of_each_text(student):
    torch.manual_seed(0)
    torch.nn.init.uniform_(student.text.last.layer_scale)
    text, seen = torch.randint(1, 49000, (3, 77)), []
    mlp = student.text.last.mlp
    hook = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with torch.no_grad():
        features, tokens = student.text(text), all_tokens(student.text, text)
    hook.remove()
    assert seen == [(3, 512), (3, 77, 512)]
    expected = tokens[torch.arange(3), text.argmax(1)] @ student.text.text_projection
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
