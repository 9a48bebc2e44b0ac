"""siclip-s0: MobileCLIP-S0 with simplified blocks, as in the paper."""

import re

import pytest
import torch
from typer.testing import CliRunner

from simplclip import models
from simplclip.commands.main import app
from simplclip.models.inherit import inherit
from simplclip.models.simplify import MapBlock
from simplclip.nn import SimplifiedBlock


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


def test_the_last_image_stage_shares_attention_alone(student):
    first, second = (m for m in student.visual.modules() if isinstance(m, MapBlock))
    assert first.qk is second.qk
    assert first.fc1 is not second.fc1
    texts = [m for m in student.text.modules() if isinstance(m, SimplifiedBlock)]
    assert len(texts) == 4
    assert not any(block.causal for block in texts)
    assert len({block.fc1 for block in texts}) == 4


def test_all_but_the_new_blocks_is_inherited_and_frozen(student):
    torch.manual_seed(1)
    source = models.create("mobileclip-s0")
    report = inherit(student, source)
    new = {name for name, p in student.named_parameters() if p.requires_grad}
    assert {name.split(".blocks.")[0] for name in new if name.startswith("visual")} == {"visual.trunk.stages.3"}
    assert {name.split(".")[1] for name in new if name.startswith("text.")} == {"transformer"}
    assert report.totals["inherited"] > 30_000_000


def test_a_missing_file_is_named_with_where_it_is_to_be_had(student, tmp_path):
    place = "Apple publishes mobileclip_s0.pt at https://docs-assets.developer.apple.com/.*/mobileclip_s0.pt"
    for read in (lambda path: inherit(student, path), lambda path: models.create("siclip-tiny", checkpoint=path)):
        with pytest.raises(FileNotFoundError, match=place):
            read(tmp_path / "mobileclip_s0.pt")
        with pytest.raises(FileNotFoundError, match=r"other[.]pt$"):
            read(tmp_path / "other.pt")


@pytest.mark.prove
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA, for the plan of a card")
@pytest.mark.parametrize("name", ["siclip-s0", "siclip2-s0"])
def test_the_configs_fit_a_24_gib_card(name):
    shown = CliRunner().invoke(app, ["plan", name, "--card", "3090", "--teacher-width", "768"])
    assert shown.exit_code == 0, shown.output
    assert re.search(r"as configured .* GiB +yes", shown.output), shown.output


def test_the_last_blocks_mlp_computes_one_token_of_each_text(student):
    torch.manual_seed(0)
    torch.nn.init.uniform_(student.text.last.layer_scale)
    text, seen = torch.randint(1, 49000, (3, 77)), []
    hook = student.text.last.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with torch.no_grad():
        features, tokens = student.text(text), student.text.encode_tokens(text)
    hook.remove()
    assert seen == [(3, 512), (3, 77, 512)]
    expected = tokens[torch.arange(3), text.argmax(1)] @ student.text.text_projection
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
