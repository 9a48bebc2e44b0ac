"""Layer-wise distillation of blocks: the distance, the targets, and which tokens count, in every kind of tower."""

import copy
from contextlib import nullcontext

import pytest
import torch
from clips import batch, clip
from open_clip.model import CLIP, CustomTextCLIP
from test_simplify import fastvit_clip
from torch import nn
from torch.profiler import ProfilerActivity, profile

from simplclip import models
from simplclip.models import layerwise
from simplclip.models.layerwise import BlockDistillation, block_distance, load_original, text_lengths
from simplclip.models.simplify import TransformerBlock, simplify
from simplclip.nn import SimplifiedBlock


def maps():
    """A tiny FastViT whose blocks change their input; as made, a layer scale of 1e-5 hides that."""
    model = fastvit_clip().eval()
    for name, p in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(p, 0.5)
    return model


TOWERS = {
    "causal text": lambda: (clip(), "text", lambda m: m.encode_text(batch()[1])),
    "text": lambda: (clip(cls=CustomTextCLIP, text={"no_causal_mask": True}), "text", lambda m: m.encode_text(batch()[1])),
    "image": lambda: (clip(), "image", lambda m: m.encode_image(batch()[0])),
    "timm's ViT": lambda: (
        models.create("siclip-lite0", simplified=False).eval(),
        "image",
        lambda m: m.encode_image(batch(48, 2)[0]),
    ),
    "FastViT's maps": lambda: (maps(), "image", lambda m: m.visual(batch(64, 2)[0])),
}


def written_out(output, target, eps=1e-5):
    """The distance of one sample, [L, C] each, token by token."""
    of_tokens = []
    for a, b in zip(output, target):
        a, b = ((t - t.mean()) / (t.var(correction=0) + eps).sqrt() for t in (a, b))
        of_tokens.append(((a - b) ** 2).sum() / (2 * len(a)))
    return sum(of_tokens) / len(of_tokens)


def student_of(original, tower):
    """A simplified copy, whose blocks mix tokens, and the paths of its blocks."""
    torch.manual_seed(1)
    student, report = simplify(copy.deepcopy(original), towers=(tower,), gamma=0.5)
    for module in student.modules():
        if isinstance(module, SimplifiedBlock):
            nn.init.normal_(module.qk.weight, std=0.3)
    return student, [block.path for block in report.replaced]


def test_distance_is_one_minus_the_correlation():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5, 64, dtype=torch.float64)
    want = [sum(1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*sample)) / 5 for sample in zip(a, b)]
    torch.testing.assert_close(block_distance(a, b), torch.stack(want)[:, None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block_distance(7 * a - 3, b), block_distance(a, b), rtol=1e-4, atol=1e-4)
    assert not block_distance(a, a).any()
    torch.testing.assert_close(block_distance(-a, a), torch.full((3, 1), 2.0, dtype=torch.float64), rtol=1e-4, atol=0)
    assert block_distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_lengths_and_maps():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    want = torch.stack([written_out(x[:n], y[:n]) for x, y, n in zip(a, b, (1, 3, 4))])[:, None]
    torch.testing.assert_close(block_distance(a, b, torch.tensor([1, 3, 4])), want)
    maps = [t.reshape(3, 2, 2, 6).permute(0, 3, 1, 2) for t in (a, b)]
    torch.testing.assert_close(block_distance(*maps), block_distance(a, b))


@pytest.mark.parametrize("tower", TOWERS)
def test_targets_and_gradients(tower, monkeypatch):
    """The targets are what the original computes, and the gradients those of the formula, written out."""
    original, name, encode = TOWERS[tower]()
    student, paths = student_of(original, name)
    student = student.train() if tower == "causal text" else student.eval()
    of_original, of_student, targets = [], [], []
    handles = [original.get_submodule(p).register_forward_hook(lambda m, a, out: of_original.append(out)) for p in paths]
    handles += [student.get_submodule(p).register_forward_hook(lambda m, a, out: of_student.append(out)) for p in paths]
    encode(original), encode(student)
    for handle in handles:
        handle.remove()

    def tokens(t):
        return t.flatten(2).transpose(1, 2) if t.dim() == 4 else t

    until = 9 if tower == "causal text" else None
    pairs = [(tokens(out), tokens(target).detach()) for out, target in zip(of_student, of_original)]
    want = torch.stack([torch.stack([written_out(a[:until], b[:until]) for a, b in zip(*pair)]) for pair in pairs], 1)
    parameters = [p for path in paths for p in student.get_submodule(path).parameters()]
    want_gradients = torch.autograd.grad(want.mean(), parameters, allow_unused=True)

    plain = layerwise.block_distance
    monkeypatch.setattr(layerwise, "block_distance", lambda a, b, n: (targets.append(b.clone()), plain(a, b, n))[1])
    given = torch.tensor([9] * 3) if name == "text" else None  # counts in causal blocks alone
    original.train()  # whatever the mode, targets are those of eval mode
    with BlockDistillation(student, original, paths).watch(given) as distances:
        encode(student)
    for target, expected in zip(targets, of_original, strict=True):
        torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-5)
    assert not any(target.requires_grad for target in targets)
    got = torch.cat(distances, 1)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for p, wanted in zip(torch.autograd.grad(got.mean(), parameters, allow_unused=True), want_gradients):
        torch.testing.assert_close(p, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_block_that_equals_its_target_has_distance_0(tower):
    original, name, encode = TOWERS[tower]()
    student, paths = student_of(original, name)
    student.eval()
    with BlockDistillation(student, copy.deepcopy(student), paths).watch() as distances:
        encode(student)
    assert len(distances) == len(paths)
    assert not torch.cat(distances).any()
    with BlockDistillation(student, original, paths).watch() as distances:
        encode(student)
    assert torch.cat(distances).min() > 1e-4


def test_the_stream_starts_anew_behind_another_module():
    torch.manual_seed(0)
    make = lambda: nn.Sequential(SimplifiedBlock(8, 2), SimplifiedBlock(8, 2), nn.Linear(8, 8), SimplifiedBlock(8, 2))  # noqa: E731
    student, original, x = make(), make(), torch.randn(2, 3, 8)
    with BlockDistillation(student, original, ["0", "1", "3"]).watch() as distances:
        student(x)
    before = student[:3](x)
    first = original[0](x)
    wants = (student[0](x), first), (student[:2](x), original[1](first)), (student[3](before), original[3](before))
    torch.testing.assert_close(torch.cat(distances, 1), torch.cat([block_distance(*want) for want in wants], 1))


def test_sequences_in_the_second_dimension():
    torch.manual_seed(0)
    student, original = (nn.Sequential(TransformerBlock(8, 2), TransformerBlock(8, 2)) for _ in range(2))
    x, found = torch.randn(3, 5, 8), []
    for first in (True, False):
        for block in (*student, *original):
            block.batch_first = first
        with BlockDistillation(student, original, ["0", "1"]).watch() as distances:
            student(x if first else x.transpose(0, 1))
        found.append(torch.cat(distances, 1))
    torch.testing.assert_close(*found)
    assert found[0].shape == (3, 2)


def test_until_backward_only_the_targets_are_kept():
    original, _, encode = TOWERS["causal text"]()
    student, paths = student_of(original, "text")
    blocks, kept, features = BlockDistillation(student, original, paths), [], []
    encode(student)
    for watch in (nullcontext, blocks.watch):
        memory = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with memory as profiler, torch.autocast("cpu", dtype=torch.bfloat16), watch() as distances:
            features.append(encode(student))
        kept.append(sum(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"))
    assert features[1].requires_grad
    assert len(distances) == 4
    targets = 4 * 3 * 12 * 24 * distances[0].element_size()
    assert targets <= kept[1] - kept[0] <= 1.1 * targets


def test_hooks_and_streams_are_gone_afterwards():
    original, name, encode = TOWERS["text"]()
    student, paths = student_of(original, name)
    blocks = BlockDistillation(student, original, paths)
    with blocks.watch() as distances:
        encode(student)
    with pytest.raises(IndexError), blocks.watch():
        student.encode_text(batch()[1] + 1000)  # tokens that do not exist
    encode(student)
    assert len(distances) == len(paths)
    assert not any(block._forward_hooks for block in blocks.blocks)
    with pytest.raises(ValueError, match="paths: expected the names of replaced blocks, got none"):
        BlockDistillation(student, original, [])


def test_the_matrices_alone_have_the_dtype_of_autocast():
    """The targets are to the bit those that autocast computes from float32 weights."""
    original, name, encode = TOWERS["causal text"]()
    student, paths = student_of(original, name)
    found = []
    for dtype in (None, torch.bfloat16):
        blocks = BlockDistillation(student, copy.deepcopy(original), paths, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16), blocks.watch() as distances:
            encode(student)
        found.append(torch.cat(distances, 1))
        dtypes = {
            n.rpartition(".")[2]: p.dtype for n, p in blocks.originals[0].named_parameters() if "ln_1" in n or "mlp" in n
        }
        assert dtypes["weight"] == (dtype or torch.float32)
        assert blocks.originals[0].ln_1.weight.dtype == torch.float32
    assert torch.equal(*found)
    assert found[0].dtype == torch.float32


def test_lengths_of_texts():
    text = torch.tensor([[1, 9, 0, 0], [1, 2, 3, 9]])
    for cls in (CLIP, CustomTextCLIP):
        assert text_lengths(clip(cls=cls), text).tolist() == [2, 4]
        assert text_lengths(clip(cls=cls, text={"pool_type": "eos", "eos_id": 3}), text).tolist() == [1, 3]
        assert text_lengths(clip(cls=cls, text={"pool_type": "last"}), text) is None


def test_an_original_is_loaded_with_all_weights_of_the_blocks(tmp_path):
    options = {"text_cfg": {"layers": 1}}
    source = models.create("siclip-tiny", simplified=False, **options)
    state = source.state_dict()
    paths = [block.path for block in models.create("siclip-tiny", **options).simplify_report.replaced]
    before = torch.get_rng_state()
    loaded = load_original("siclip-tiny", state, paths, **options).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    for missing in ("visual.trunk.blocks.0.mlp.fc1.weight", "text.transformer.resblocks.0.attn.in_proj_weight"):
        torch.save({key: value for key, value in state.items() if key != missing}, tmp_path / "less.pt")
        path = next(path for path in paths if missing.startswith(path))
        with pytest.raises(
            models.inherit.InheritanceError, match=f"expected weights of the original's {path}, got .*less.pt"
        ):
            load_original("siclip-tiny", tmp_path / "less.pt", paths, **options)
