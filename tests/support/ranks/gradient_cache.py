"""Part of losses.py: gradient caching under DistributedDataParallel against one process."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from simplclip import gradient_cache
from simplclip.losses import ClipPMLoss, SigLipLoss, WIKDLoss
from simplclip.nn import SimplifiedBlock

WORLD, N = 2, 10
SIZES = ([4, 4, 2], [5, 5])  # of the micro-batches of each rank
# sizes of micro-batches of images and of texts
BY_TOWER = {
    "several of both": (4, 3),
    "one of texts": (4, N),
    "one of images": (N, 3),
    "one of both": (N, N),
}


class Model(nn.Module):
    """A model of these towers, of which a call may run one. The text tower holds the scale."""

    def __init__(self, *towers: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        image = nn.Sequential(nn.Linear(6, 16), SimplifiedBlock(16, 4))
        text = nn.Sequential(nn.Embedding(20, 16), SimplifiedBlock(16, 4, causal=True))
        if "image" in towers:
            self.image = image
        if "text" in towers:
            self.text, self.logit_scale = text, nn.Parameter(torch.tensor(2.0))
        self.double()

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor]:
        out = {}
        if image is not None:
            out["image"] = F.normalize(self.image(image).mean(1), dim=1)
        if text is not None:
            out["text"] = F.normalize(self.text(text).mean(1), dim=1)
            out["scale"] = self.logit_scale.exp()
        return out


def inputs() -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Returns images, texts, features of a teacher, and ids of all ranks."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(WORLD * N, 5, 6, generator=generator, dtype=torch.float64)
    text = torch.randint(20, (WORLD * N, 7), generator=generator)
    teacher = [
        F.normalize(torch.randn(WORLD * N, 12, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    ]
    return image, text, teacher, torch.arange(WORLD * N).clamp(min=5)


def losses(
    teacher: list[Tensor], ids: Tensor, **mode: Any
) -> dict[str, tuple[nn.Module, Callable[..., Tensor]]]:
    """Returns by name each loss, and its terms as a function of the model's outputs."""
    torch.manual_seed(2)
    clip = ClipPMLoss(**mode).double()
    weights = {"interactive_weight": 0.6, "pm_weight": 0.5, "feature_weight": 0.4}
    wikd = WIKDLoss(**weights, embed_dim=16, teacher_dim=12, **mode).double()
    rest = (*teacher, torch.tensor(30.0).double())
    options = {"output_dict": True, "ids": ids}
    rank, world_size = mode.get("rank", 0), mode.get("world_size", 1)
    sigmoid = SigLipLoss(rank=rank, world_size=world_size, pm_weight=0.5).double()
    return {
        "ClipPMLoss": (clip, lambda image, text, scale: clip(image, text, scale, **options)),
        "WIKDLoss": (wikd, lambda image, text, scale: wikd(image, text, scale, *rest, **options)),
        "SigLipLoss": (sigmoid, lambda image, text, scale: sigmoid(image, text, scale, **options)),
    }


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): p.grad
        for module in modules
        for name, p in module.named_parameters()
    }


def main(rank: int) -> None:
    image, text, teacher, ids = inputs()
    shard = slice(N * rank, N * rank + N)
    whole = losses(teacher, ids)
    mode = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": WORLD}
    rank_losses = losses([t[shard] for t in teacher], ids[shard], **mode)
    for name, (loss, terms) in rank_losses.items():
        model, (whole_loss, whole_terms) = Model("image", "text"), whole[name]
        sum(whole_terms(**model(image, text)).values()).backward()
        expected = gradients(model, whole_loss)
        check_forms(name, image[shard], text[shard], loss, terms, expected, SIZES[rank])


def check_forms(
    name: str,
    image: Tensor,
    text: Tensor,
    loss: nn.Module,
    terms: Callable[..., Tensor],
    expected: dict[str, Tensor],
    sizes: list[int],
) -> None:
    """Checks micro-batches of pairs and of each tower, with a wrapper for each and one for both."""
    for_unused = DistributedDataParallel(Model("image", "text"), find_unused_parameters=True)
    towers = dict.fromkeys(("image", "text"), for_unused)
    with pytest.raises(
        ValueError,
        match="model: expected find_unused_parameters=False of a wrapper that both towers share",
    ):
        gradient_cache.backward(towers, {"image": [image], "text": [text]}, terms, model=for_unused)
    exchanged = []

    def counting(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        exchanged.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    both = DistributedDataParallel(Model("image", "text"))
    of_image = DistributedDataParallel(Model("image"))
    of_text = DistributedDataParallel(Model("text"))
    for wrapper in (both, of_image, of_text):
        wrapper.register_comm_hook(None, counting)
    pairs = list(zip(image.split(sizes), text.split(sizes)))
    forms = [(both, lambda b: both(*b), pairs, "pairs")]
    for sizes_name, (image_size, text_size) in BY_TOWER.items():
        micro_batches = {"image": image.split(image_size), "text": text.split(text_size)}
        apart = {"image": lambda b: of_image(image=b), "text": lambda b: of_text(text=b)}
        wrappers = nn.ModuleList([of_image, of_text])
        forms.append((wrappers, apart, micro_batches, f"two wrappers, {sizes_name}"))
        shared = {"image": lambda b: both(image=b), "text": lambda b: both(text=b)}
        forms.append((both, shared, micro_batches, f"one wrapper, {sizes_name}"))
    for model, encode, micro_batches, form in forms:
        model.zero_grad()
        loss.zero_grad()
        exchanged.clear()
        gradient_cache.backward(encode, micro_batches, terms, model=model)
        count = sum(p.numel() for p in model.parameters())
        assert sum(exchanged) == count, f"{name}, {form}: exchanged {exchanged}"
        wrappers = model if isinstance(model, nn.ModuleList) else [model]
        results = gradients(*wrappers, loss)
        assert results.keys() == expected.keys()
        for key, gradient in expected.items():
            message = partial("{}: {}".format, f"{name}, {form}, {key}")
            torch.testing.assert_close(results[key], gradient, rtol=1e-10, atol=1e-12, msg=message)
