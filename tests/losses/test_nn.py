"""Shaped attention and the simplified block as modules."""

import copy

import pytest
import torch
from torch import nn

from simplclip.nn import ShapedAttention, SimplifiedBlock, neighbour_groups, share_weights
from support.ops import plain


def test_attention_module_starts_as_the_identity():
    x = torch.randn(2, 7, 12)
    for causal in (False, True):
        torch.testing.assert_close(ShapedAttention(12, 3, causal=causal)(x), x)
    mixed = ShapedAttention(12, 3, gamma=0.25)(x)
    torch.testing.assert_close(mixed, x + 0.75 * x.mean(1, keepdim=True))
    rotated = ShapedAttention(12, 3, value=True, output=True)(x)
    assert not torch.allclose(rotated, x)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))  # orthogonal projections


@pytest.mark.parametrize("drop_path", [0.0, 1e-12])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "norm": "rmsnorm", "act": "silu", "value": True, "output": True},
        {"recompute": True, "act": "relu"},
    ],
)
def test_a_block_is_the_definition_of_its_parameters(options, drop_path):
    """With lengths. A block with drop_path runs norm, attention and MLP apart."""
    torch.manual_seed(0)
    block = SimplifiedBlock(12, 3, 2.0, drop_path=drop_path, **options).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x, lengths = torch.randn(2, 6, 12, dtype=torch.float64), torch.tensor([4, 6])
    weights = {name.replace(".", "_"): p for name, p in block.named_parameters()}
    modes = {name: value for name, value in options.items() if name in ("causal", "norm", "act")}
    torch.testing.assert_close(
        block(x, lengths), plain.simplified_block(x, **weights, **modes, lengths=lengths)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    if dtype == torch.float16 and not torch.amp.is_autocast_available("cpu"):
        pytest.skip("no float16 autocast on this CPU")
    block, x = SimplifiedBlock(12, 3), torch.randn(2, 6, 12)
    nn.init.normal_(block.qk.weight, std=0.2)
    with torch.autocast("cpu", dtype):
        low = block(x)
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), block(x), rtol=0.05, atol=0.05)
    low.float().sum().backward()
    assert block.qk.weight.grad.dtype == torch.float32


def test_drop_path_skips_the_mlp_of_some_samples_in_training_only():
    torch.manual_seed(0)
    block = SimplifiedBlock(8, 2, drop_path=0.5, mlp_gain=1.0)
    x = torch.randn(64, 3, 8)
    attention_only = block.norm(x)  # attention is the identity in a new block
    dropped = torch.isclose(block(x), attention_only).all(dim=(1, 2)).sum()
    assert 16 <= dropped <= 48
    block.eval()
    assert not torch.isclose(block(x), attention_only).all(dim=(1, 2)).any()


def test_signal_and_gradient_keep_their_size_through_a_deep_skipless_stack():
    torch.manual_seed(0)
    stack = nn.Sequential(*(SimplifiedBlock(64, 4, causal=True) for _ in range(12)))
    x = torch.randn(4, 16, 64, requires_grad=True)
    out = stack(x)
    assert 0.5 < out.std() < 2
    (out * torch.randn_like(out)).sum().backward()
    norms = torch.stack([block.fc1.weight.grad.norm() for block in stack])
    assert norms.max() < 4 * norms.min()
    similarity = torch.nn.functional.cosine_similarity(out[:, 0], out[:, 8], dim=-1)
    assert similarity.abs().mean() < 0.5  # tokens have not collapsed into one


def block(*shape, **options):
    return SimplifiedBlock(*shape or (12, 3), **options)


TOKENS = torch.zeros(2, 5, 12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: block(12, 5), "heads: expected a divisor of the width 12, got 5"),
        (lambda: block(12, 0), "heads: expected an integer of at least 1, got 0"),
        (lambda: block(12.0, 3), "width: expected an integer of at least 1, got 12.0"),
        (lambda: block(gamma="x"), "gamma: expected a number, got str"),
        (lambda: block(mlp_ratio="4"), "mlp_ratio: expected a number, got str"),
        (lambda: block()(None), r"x: expected \[B, L, 12\], got NoneType"),
        *(
            (lambda name=name: block(**{name: "no"}), f"{name}: expected a bool, got str")
            for name in ("causal", "value", "output", "recompute")
        ),
        (lambda: block(norm="batchnorm"), "norm: expected one of .*'layernorm'.*got 'batchnorm'"),
        (lambda: block(act="tanh"), "act: expected one of .*'gelu'.*got 'tanh'"),
        (lambda: block(drop_path=1.0), "drop_path: expected a probability"),
        (lambda: block(mlp_ratio=0.0), "mlp_ratio: expected at least one hidden unit"),
        (lambda: block()(TOKENS[:, :, 4:]), r"x: expected \[B, L, 12\], got \[2, 5, 8\]"),
        (lambda: block()(TOKENS, torch.ones(1).long()), r"lengths: expected one per .*, \[2\]"),
        (lambda: block()(TOKENS.to_mkldnn()), "the layout mkldnn"),
        (lambda: block()(torch.nested.nested_tensor([TOKENS[0]])), "x: .*, got the layout nested"),
        (lambda: neighbour_groups(4, 0), "size: expected an integer of at least 1, got 0"),
        (lambda: neighbour_groups(-4), "count: expected an integer of at least 0, got -4"),
        (lambda: share_weights([nn.Linear(2, 2)], [[0]]), "blocks: expected SimplifiedBlocks, got"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_bad_arguments(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


@pytest.mark.parametrize("norms_and_gains", [False, True])
def test_shared_weights_count_once(norms_and_gains):
    stack = nn.Sequential(*(SimplifiedBlock(8, 2, value=i == 0, output=i == 3) for i in range(4)))
    share_weights(stack, neighbour_groups(4), norms_and_gains=norms_and_gains)
    sizes = {name: p.numel() for name, p in SimplifiedBlock(8, 2).named_parameters()}
    small = sum(size for name, size in sizes.items() if not name.startswith(("qk", "fc")))
    expected = 2 * sum(sizes.values()) + 2 * 64 + (0 if norms_and_gains else 2 * small)
    assert sum(p.numel() for p in stack.parameters()) == expected
    assert stack[1].value is None
    assert stack[3].output is not None
    assert neighbour_groups(5, 3) == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("norms_and_gains", [False, True])
def test_attention_and_mlp_may_be_shared_among_different_groups(norms_and_gains):
    def shared():
        blocks = nn.Sequential(*(SimplifiedBlock(8, 2, value=True, output=True) for _ in range(4)))
        share_weights(blocks, [[0, 1, 2, 3]], "attention", norms_and_gains=norms_and_gains)
        share_weights(blocks, [[0, 1], [2, 3]], "mlp", norms_and_gains=norms_and_gains)
        return blocks

    stack, other = shared(), shared()
    x = torch.randn(2, 3, 8)
    for blocks in (stack, copy.deepcopy(stack)):
        for name in ("qk", "value", "output"):
            assert len({id(getattr(block, name)) for block in blocks}) == 1
        for name in ("fc1", "fc2"):
            first, second, third, fourth = (getattr(block, name) for block in blocks)
            assert first is second is not third is fourth
        for name in ("alpha", "beta", "gamma", "attention_gain"):
            count = len({id(getattr(block, name)) for block in blocks})
            assert count == (1 if norms_and_gains else 4)
        assert len({id(block.mlp_gain) for block in blocks}) == (2 if norms_and_gains else 4)
        assert len({id(block.norm) for block in blocks}) == 4  # attention and MLP share the norm
    torch.testing.assert_close(torch.compile(stack, fullgraph=True, backend="eager")(x), stack(x))
    stack(x).sum().backward()
    assert all(p.grad is not None for p in stack.parameters())
    other.load_state_dict(stack.state_dict(), strict=True)
    torch.testing.assert_close(other(x), stack(x))


@pytest.mark.parametrize(
    ("what", "groups", "words"),
    [
        ("all", [[]], "an empty one"),
        ("all", [[0, 3]], "of 3 blocks, got 3"),
        ("mlp", [[0, 1], [1, 2]], "block 1 twice"),
        ("all", [[0, 1]], "equal hidden within group .0, 1., got .32, 16."),
        ("mlp", [[0, 1]], "equal hidden"),
        ("attention", [[0, 2]], "equal heads within group .0, 2., got .2, 4."),
        ("mlp", [[0, 2]], "equal act within group"),
        ("norms", [[0, 1]], "what: expected one of 'attention', 'mlp', 'all', got 'norms'"),
        ("all", 0, "groups: expected groups of indices, e.g. .*, got int"),
        ("all", [[0, "1"]], "groups: expected groups of indices, e.g. .*, got str"),
    ],
)
def test_share_weights_rejects(what, groups, words):
    blocks = [SimplifiedBlock(8, 2), SimplifiedBlock(8, 2, 2.0), SimplifiedBlock(8, 4, act="relu")]
    with pytest.raises((TypeError, ValueError), match=words):
        share_weights(blocks, groups, what)
    assert blocks[0].qk is not blocks[1].qk


def test_norms_of_two_kinds_are_not_shared():
    blocks = [SimplifiedBlock(8, 2), SimplifiedBlock(8, 2, norm="rmsnorm")]
    words = "equal norm_name within group .1, 0., got .'rmsnorm', 'layernorm'."
    with pytest.raises(ValueError, match=words):
        share_weights(blocks, [[1, 0]], norms_and_gains=True)
    share_weights(blocks, [[1, 0]])
    assert blocks[0].norm is not blocks[1].norm


def test_each_part_asks_only_for_what_it_shares():
    blocks = [SimplifiedBlock(8, 2), SimplifiedBlock(8, 2, 2.0), SimplifiedBlock(8, 4)]
    share_weights(blocks, [[0, 1]], "attention")
    share_weights(blocks, [[0, 2]], "mlp")
    assert blocks[0].qk is blocks[1].qk is not blocks[2].qk
    assert blocks[0].fc2 is blocks[2].fc2 is not blocks[1].fc2


class Adapted(nn.Linear):
    """A layer with a product of its own, as LoRA's."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "change", [nn.utils.weight_norm, nn.utils.spectral_norm, lambda linear: Adapted(8, 32), None]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_layers_whose_call_the_op_would_leave_out_are_refused(change):
    """Parametrizations, whose weight the op reads as it is, work."""
    block, x = SimplifiedBlock(8, 2), torch.randn(2, 5, 8)
    if change is None:
        nn.utils.parametrizations.spectral_norm(block.fc1)
        block(x).sum().backward()
        assert block.fc1.parametrizations.weight.original.grad.any()
        return
    block.fc1 = change(block.fc1)
    with pytest.raises(
        TypeError, match="fc1: expected a Linear or norm as it was made, .* got (Linear|Adapted)"
    ):
        block(x)


def set_forward(layer, hook):
    layer.forward = hook


@pytest.mark.parametrize(
    "add",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
        set_forward,
    ],
)
def test_hooks_of_layers_which_the_op_would_not_call_are_refused(add):
    for name in ("qk", "fc1", "fc2", "norm", "value", "output"):
        block = SimplifiedBlock(8, 2, value=True, output=True)
        handle = add(block.get_submodule(name), lambda *_: None)
        with pytest.raises(TypeError, match=f"^{name}: expected .* hooks"):
            block(torch.randn(2, 5, 8))
        if handle is not None:
            handle.remove()
            block(torch.randn(2, 5, 8))
