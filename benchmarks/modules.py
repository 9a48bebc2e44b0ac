"""Attention, MLP, block, text tower, inference and training step, as simplclip and others do them.

Each op is a dict of forms. A form makes, from a shape, a dtype and a device, a function that runs
once and returns a tensor to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

import simplclip
from benchmarks.losses import pair_matching
from simplclip import models
from simplclip.losses import ClipPMLoss, WIKDLoss
from simplclip.models.fold import fold_frozen
from simplclip.nn import SimplifiedBlock
from simplclip.ops import parallel_mlp, shaped_attention

Run = Callable[[], Tensor]
WIDTH, HEADS = 512, 8  # of CLIP's text tower
TEACHER_WIDTH = 768
END = 49407  # the token at the end of a text


@dataclass(frozen=True)
class Shape:
    """B sequences of L tokens; of a step or of inference, B pairs."""

    sequences: int
    length: int = 77


def normal(*sizes: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _step(function: Callable[..., Tensor], leaves: list[Tensor]) -> Tensor:
    """Runs forward and backward, with the output as its own gradient; returns that of leaf 0."""
    for leaf in leaves:
        leaf.grad = None
    out = function(*leaves)
    out.backward(out.detach())
    return leaves[0].grad


# Attention: q, k, v and the gains alpha, beta, gamma, causal.
def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, causal: bool = True
) -> Tensor:
    """Computes the formula with softmax and mixing weights in float32 and one product with v."""
    length = q.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    logits = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
        logits = logits.masked_fill(~visible, -torch.inf)
    uniform = visible.float() / visible.sum(-1, keepdim=True)
    identity = torch.eye(length, device=q.device)
    alpha, beta, gamma = (t.float()[:, None, None] for t in (alpha, beta, gamma))
    mixed = alpha * identity + beta * logits.softmax(-1) - gamma * uniform
    return (mixed.to(v.dtype) @ v).transpose(1, 2)


def _sdpa_and_terms(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor
) -> Tensor:
    heads = (t.transpose(1, 2) for t in (q, k, v))
    attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    alpha, beta, gamma = (t.to(v.dtype)[:, None] for t in (alpha, beta, gamma))
    counts = torch.arange(1, v.shape[1] + 1, dtype=v.dtype, device=v.device)
    mean = v.cumsum(1) / counts[:, None, None]
    return alpha * v + beta * attended - gamma * mean


def attention(function: Callable, shape: Shape, dtype: torch.dtype, device: str) -> Run:
    sizes = shape.sequences, shape.length, HEADS, WIDTH // HEADS
    tensors = [normal(*sizes, seed=seed, dtype=dtype, device=device) for seed in range(3)]
    gains = [normal(HEADS, seed=seed, dtype=torch.float32, device=device) for seed in range(3)]
    leaves = [t.requires_grad_() for t in (*tensors, *gains)]
    return partial(_step, function, leaves)


# MLP: x and the weights and biases of two linear layers.
def _plain_mlp(x: Tensor, fc1: Tensor, bias1: Tensor, fc2: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, fc1, bias1)), fc2, bias2)


def mlp(function: Callable, shape: Shape, dtype: torch.dtype, device: str) -> Run:
    hidden = 4 * WIDTH
    sizes: list[tuple[int, ...]] = [(shape.sequences, shape.length, WIDTH)]
    sizes += [(hidden, WIDTH), (hidden,), (WIDTH, hidden), (WIDTH,)]
    leaves = []
    for seed, size in enumerate(sizes):
        tensor = normal(*size, seed=seed, dtype=dtype, device=device)
        leaves.append((tensor if seed == 0 else tensor * size[-1] ** -0.5).requires_grad_())
    return partial(_step, function, leaves)


class PlainBlock(nn.Module):
    """A module that computes a SimplifiedBlock from its parameters in plain torch ops."""

    def __init__(self, block: SimplifiedBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        block = self.block
        n = block.norm(x)
        q, k = F.linear(n, block.qk.weight).chunk(2, -1)
        heads = [t.reshape(*x.shape[:2], block.heads, -1) for t in (q, k, n)]
        gains = block.alpha, block.beta, block.gamma
        attended = plain_attention(*heads, *gains, causal=block.causal).reshape(x.shape)
        return block.attention_gain * attended + block.mlp_gain * block.fc2(F.gelu(block.fc1(n)))

    def get_weight_dtype(self) -> torch.dtype:
        """open_clip asks the block of a tower for it."""
        return self.block.fc1.weight.dtype


def _simplified(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    block = SimplifiedBlock(WIDTH, HEADS, causal=True, **options)
    nn.init.normal_(block.qk.weight, std=WIDTH**-0.5)
    return block


def block(make: Callable[[], nn.Module], shape: Shape, dtype: torch.dtype, device: str) -> Run:
    module = make().to(device, dtype)
    x = normal(shape.sequences, shape.length, WIDTH, seed=0, dtype=dtype, device=device)
    function: Callable[..., Tensor] = module
    if isinstance(module, ResidualAttentionBlock):
        mask = torch.full((shape.length, shape.length), -torch.inf, dtype=dtype, device=device)
        function = partial(module, attn_mask=mask.triu(1))
    return partial(_step, function, [x.requires_grad_()])


def _autocast(dtype: torch.dtype, device: str) -> torch.autocast:
    return torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)


# Tokens of captions like CC12M's alt texts, start and end included.
LENGTHS = (8, 10, 10, 12, 12, 14, 14, 16, 18, 20, 20, 23, 26, 30, 35, 35, 41, 48, 56, 77)


def texts(groups: int | None, shape: Shape, dtype: torch.dtype, device: str) -> Run:
    """ViT-B-32's text tower, D = 512, on captions that are padded or cropped in groups."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32", device=device)
    text = torch.zeros(shape.sequences, 77, dtype=torch.long)
    for row in range(shape.sequences):
        length = LENGTHS[row * 7 % len(LENGTHS)]
        text[row, :length] = torch.randint(1, END - 1, (length,))
        text[row, length - 1] = END
    text, weights = text.to(device), torch.arange(512.0, device=device)
    if groups is not None:
        simplclip.crop_texts(model, groups=groups)

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        with _autocast(dtype, device):
            features = model.encode_text(text, normalize=True)
        (features.float().square() @ weights).sum().backward()
        return features.detach()

    return run


def inputs_of(model: Any, pairs: int, device: str) -> tuple[Tensor, Tensor]:
    """Returns random images and texts for a model."""
    torch.manual_seed(0)
    image = torch.rand(pairs, 3, *open_clip.utils.to_2tuple(model.visual.image_size))
    text = torch.randint(1, 8000, (pairs, getattr(model, "text", model).context_length))
    return image.to(device), text.to(device)


def inference(name: str, shape: Shape, dtype: torch.dtype, device: str) -> Run:
    """Both towers of a folded model, in channels_last."""
    torch.manual_seed(0)
    model: Any = simplclip.fold(models.create(name).eval()).to(device, dtype)
    model.visual.to(memory_format=torch.channels_last)
    image, text = inputs_of(model, shape.sequences, device)

    @torch.no_grad()
    def run() -> Tensor:
        model.encode_text(text)
        return model.encode_image(image.to(dtype))

    return run


def _in_plain_torch(model: nn.Module) -> nn.Module:
    """Replaces the model's simplified blocks, in place, by plain torch ops."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SimplifiedBlock):
                setattr(parent, name, PlainBlock(child))
    return model


class DenseLoss(ClipPMLoss):
    """ClipPMLoss as open_clip and plain torch write it."""

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        matching = pair_matching(image @ text.T, self.plane_weight, self.plane_bias)
        return matching + ClipLoss()(image, text, scale)


def _siclip_tiny() -> tuple[nn.Module, nn.Module]:
    return models.create("siclip-tiny"), ClipPMLoss()


def _siclip_tiny_in_plain_torch() -> tuple[nn.Module, nn.Module]:
    return _in_plain_torch(models.create("siclip-tiny")), DenseLoss()


def _siclip_s0() -> tuple[nn.Module, nn.Module]:
    """siclip-s0 with inherited and frozen modules, all terms of WIKD and pair matching."""
    model = models.create("siclip-s0")
    train = ["visual.trunk.head", "text.ln_final", "text.text_projection"]
    simplclip.inherit(model, models.create("mobileclip-s0"), train=train, blocks="first")
    terms = {"feature_weight": 1.0, "interactive_weight": 1.0, "pm_weight": 1.0}
    return model, WIKDLoss(**terms, embed_dim=512, teacher_dim=TEACHER_WIDTH)


def _mobileclip_s0() -> tuple[nn.Module, nn.Module]:
    return models.create("mobileclip-s0"), ClipLoss()


def step(
    make: Callable[[], tuple[nn.Module, nn.Module]], shape: Shape, dtype: torch.dtype, device: str
) -> Run:
    """A training step on random pairs: forward, loss, backward, clipping and AdamW; no loader."""
    torch.manual_seed(0)
    made, loss = make()
    model: Any = made.train().to(device)
    loss.to(device)
    for copy in fold_frozen(model).values():
        copy.to(device)
    image, text = inputs_of(model, shape.sequences, device)
    parts = nn.ModuleList([model, loss])
    trained = [weight for weight in parts.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    teacher: list[Tensor] = []
    if isinstance(loss, WIKDLoss):
        wide = partial(normal, shape.sequences, TEACHER_WIDTH, dtype=torch.float32, device=device)
        teacher = [F.normalize(wide(seed=0), dim=1), F.normalize(wide(seed=1), dim=1)]
        teacher.append(torch.tensor(100.0, device=device))

    def run() -> Tensor:
        with _autocast(dtype, device):
            x = model.encode_image(image, normalize=True)
            y = model.encode_text(text, normalize=True)
            value = loss(x, y, model.logit_scale.exp(), *teacher)
        value = sum(value) if isinstance(value, tuple) else value
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return value.detach()

    return run


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


# By op and form; what is compiled is made when it runs.
MODULES: dict[str, dict[str, Callable[[Shape, torch.dtype, str], Run]]] = {
    "attention": {
        "simplclip": partial(attention, partial(shaped_attention, causal=True)),
        "plain": partial(attention, plain_attention),
        "compiled": partial(attention, _compiled(plain_attention)),
        "sdpa": partial(attention, _sdpa_and_terms),
        "compiled_sdpa": partial(attention, _compiled(_sdpa_and_terms)),
    },
    "mlp": {
        "simplclip": partial(mlp, parallel_mlp),
        "plain": partial(mlp, _plain_mlp),
        "compiled": partial(mlp, _compiled(_plain_mlp)),
    },
    "block": {
        "simplclip": partial(block, _simplified),
        "recompute": partial(block, partial(_simplified, recompute=True)),
        "plain": partial(block, lambda: PlainBlock(_simplified())),
        "compiled": partial(block, lambda: _compiled(PlainBlock(_simplified()))),
        "open_clip": partial(block, lambda: ResidualAttentionBlock(WIDTH, HEADS)),
    },
    "texts": {"simplclip": partial(texts, 4), "open_clip": partial(texts, None)},
    "inference": {
        "simplclip": partial(inference, "siclip-s0"),
        "open_clip": partial(inference, "mobileclip-s0"),
    },
    "tiny": {
        "simplclip": partial(step, _siclip_tiny),
        "plain": partial(step, _siclip_tiny_in_plain_torch),
    },
    "step": {
        "simplclip": partial(step, _siclip_s0),
        "open_clip": partial(step, _mobileclip_s0),
    },
}
