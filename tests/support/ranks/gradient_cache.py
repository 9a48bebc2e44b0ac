"""What each rank of test_distributed.py runs: gradient caching under DistributedDataParallel
against one process.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from simplclip import gradient_cache
from simplclip.losses import ClipPMLoss, SigLipLoss, WIKDLoss
from simplclip.nn import SimplifiedBlock

WORLD, N = 2, 10
SIZES = ([4, 4, 2], [5, 5])  # of the micro-batches of each rank
BY_TOWER = {
    "several of both": (4, 3),
    "one of texts": (4, N),
    "one of images": (N, 3),
    "one of both": (N, N),
}


class Model(nn.Module):
    """A model of these towers, of which a call may run one. The text tower holds the scale."""

    def __init__(self, *towers):
        super().__init__()
        torch.manual_seed(0)
        image = nn.Sequential(nn.Linear(6, 16), SimplifiedBlock(16, 4))
        text = nn.Sequential(nn.Embedding(20, 16), SimplifiedBlock(16, 4, causal=True))
        if "image" in towers:
            self.image = image
        if "text" in towers:
            self.text, self.logit_scale = text, nn.Parameter(torch.tensor(2.0))
        self.double()

    def forward(self, image=None, text=None):
        out = {}
        if image is not None:
            out["image"] = F.normalize(self.image(image).mean(1), dim=1)
        if text is not None:
            out |= {
                "text": F.normalize(self.text(text).mean(1), dim=1),
                "scale": self.logit_scale.exp(),
            }
        return out


def inputs():
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(WORLD * N, 5, 6, generator=generator, dtype=torch.float64)
    text = torch.randint(20, (WORLD * N, 7), generator=generator)
    teacher = [
        F.normalize(torch.randn(WORLD * N, 12, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    ]
    return image, text, teacher, torch.arange(WORLD * N).clamp(min=5)


def losses(teacher, ids, **mode):
    """Returns by name each loss, and its terms as a function of the model's outputs."""
    torch.manual_seed(2)
    clip = ClipPMLoss(**mode).double()
    weights = {"interactive_weight": 0.6, "pm_weight": 0.5, "feature_weight": 0.4}
    wikd = WIKDLoss(**weights, embed_dim=16, teacher_dim=12, **mode).double()
    rest = (*teacher, torch.tensor(30.0).double())
    options = {"output_dict": True, "ids": ids}
    sigmoid = SigLipLoss(
        rank=mode.get("rank", 0), world_size=mode.get("world_size", 1), pm_weight=0.5
    ).double()
    return {
        "ClipPMLoss": (clip, lambda image, text, scale: clip(image, text, scale, **options)),
        "WIKDLoss": (wikd, lambda image, text, scale: wikd(image, text, scale, *rest, **options)),
        "SigLipLoss": (sigmoid, lambda image, text, scale: sigmoid(image, text, scale, **options)),
    }


def gradients(*modules):
    return {
        name.removeprefix("module."): p.grad
        for module in modules
        for name, p in module.named_parameters()
    }


def main(rank):
    image, text, teacher, ids = inputs()
    shard = slice(N * rank, N * rank + N)
    whole = losses(teacher, ids)
    mode = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": WORLD}
    for name, (loss, part) in losses([t[shard] for t in teacher], ids[shard], **mode).items():
        alone, (whole_loss, of_whole) = Model("image", "text"), whole[name]
        sum(of_whole(**alone(image, text)).values()).backward()
        check_forms(
            image[shard], text[shard], loss, part, gradients(alone, whole_loss), SIZES[rank], name
        )


def check_forms(image, text, loss, part, expected, sizes, what):
    """Checks micro-batches of pairs, and of each tower with a wrapper for each tower and with one
    for both: ranks exchange all gradients once a step.
    """
    for_unused = DistributedDataParallel(Model("image", "text"), find_unused_parameters=True)
    towers = dict.fromkeys(("image", "text"), for_unused)
    with pytest.raises(
        ValueError,
        match="model: expected find_unused_parameters=False of a wrapper that both towers share",
    ):
        gradient_cache.backward(towers, {"image": [image], "text": [text]}, part, model=for_unused)
    exchanged = []

    def counting(state, bucket):
        exchanged.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    both, of_image, of_text = (
        DistributedDataParallel(Model(*names))
        for names in (("image", "text"), ("image",), ("text",))
    )
    for wrapper in (both, of_image, of_text):
        wrapper.register_comm_hook(None, counting)
    batches = {
        name: dict(zip(("image", "text"), (image.split(a), text.split(b))))
        for name, (a, b) in BY_TOWER.items()
    }
    forms = [(both, lambda b: both(*b), list(zip(image.split(sizes), text.split(sizes))), "pairs")]
    for name, micro_batches in batches.items():
        apart = {"image": lambda b: of_image(image=b), "text": lambda b: of_text(text=b)}
        forms.append(
            (nn.ModuleList([of_image, of_text]), apart, micro_batches, f"two wrappers, {name}")
        )
        shared = {"image": lambda b: both(image=b), "text": lambda b: both(text=b)}
        forms.append((both, shared, micro_batches, f"one wrapper, {name}"))
    for model, encode, micro_batches, form in forms:
        model.zero_grad()
        loss.zero_grad()
        exchanged.clear()
        gradient_cache.backward(encode, micro_batches, part, model=model)
        wrappers = [of_image, of_text] if isinstance(model, nn.ModuleList) else [model]
        assert sum(exchanged) == sum(p.numel() for p in model.parameters()), (
            f"{what}, {form}: exchanged {exchanged}"
        )
        results = gradients(*wrappers, loss)
        assert results.keys() == expected.keys()
        for key, gradient in expected.items():
            message = lambda m, key=key, form=form: f"{what}, {form}, {key}: {m}"  # noqa: E731
            torch.testing.assert_close(results[key], gradient, rtol=1e-10, atol=1e-12, msg=message)
