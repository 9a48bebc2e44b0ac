"""What each rank of test_distributed.py runs: gradient caching under DistributedDataParallel against one process."""

import itertools

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
SIZES = ((4, 4, 2), (5, 5))  # of the micro-batches of each rank


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(6, 16), SimplifiedBlock(16, 4))
        self.text = nn.Sequential(nn.Embedding(20, 16), SimplifiedBlock(16, 4, causal=True))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image, text):
        x, y = (F.normalize(t.mean(1), dim=1) for t in (self.image(image), self.text(text)))
        return x, y, self.logit_scale.exp()


class Tower(nn.Module):
    """One tower of a model in a wrapper of its own; the text tower holds the scale."""

    def __init__(self, tower, logit_scale=None):
        super().__init__()
        self.tower, self.logit_scale = tower, logit_scale

    def forward(self, batch):
        features = F.normalize(self.tower(batch).mean(1), dim=1)
        return features if self.logit_scale is None else (features, self.logit_scale.exp())


class OneAtATime(Model):
    """Both towers in one wrapper, which runs one of them."""

    def forward(self, image=None, text=None):
        x = F.normalize((self.text(text) if image is None else self.image(image)).mean(1), dim=1)
        return x if text is None else (x, self.logit_scale.exp())


def inputs():
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(WORLD * N, 5, 6, generator=generator, dtype=torch.float64)
    text = torch.randint(20, (WORLD * N, 7), generator=generator)
    teacher = [F.normalize(torch.randn(WORLD * N, 12, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)]
    return image, text, teacher, torch.arange(WORLD * N).clamp(min=5)


def losses(teacher, ids, **mode):
    """Returns by name each loss, and its terms as a function of the model's outputs."""
    torch.manual_seed(2)
    clip = ClipPMLoss(**mode).double()
    weights = {"interactive_weight": 0.6, "pm_weight": 0.5, "feature_weight": 0.4}
    wikd = WIKDLoss(**weights, embed_dim=16, teacher_dim=12, **mode).double()
    rest = (*teacher, torch.tensor(30.0).double())
    options = {"output_dict": True, "ids": ids}
    sigmoid = SigLipLoss(rank=mode.get("rank", 0), world_size=mode.get("world_size", 1), pm_weight=0.5).double()
    return {
        "ClipPMLoss": (clip, lambda *o: clip(*o, **options)),
        "WIKDLoss": (wikd, lambda *o: wikd(*o, *rest, **options)),
        "SigLipLoss": (sigmoid, lambda *o: sigmoid(*o, **options)),
    }


def gradients(*modules):
    return {f"{i}.{name.removeprefix('module.')}": p.grad for i, m in enumerate(modules) for name, p in m.named_parameters()}


def main(rank):
    image, text, teacher, ids = inputs()
    mine = slice(N * rank, N * rank + N)
    whole = losses(teacher, ids)
    mode = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": WORLD}
    exchanged = []

    def counting(state, bucket):
        exchanged.append(bucket.index())
        return allreduce_hook(state, bucket)

    model = DistributedDataParallel(Model().double())
    model.register_comm_hook(None, counting)
    for name, (loss, part) in losses([t[mine] for t in teacher], ids[mine], **mode).items():
        alone, (whole_loss, of_whole) = Model().double(), whole[name]
        sum(of_whole(*alone(image, text)).values()).backward()
        expected = gradients(alone, whole_loss)
        model.zero_grad()
        loss.zero_grad()
        exchanged.clear()
        batches = list(zip(image[mine].split(SIZES[rank]), text[mine].split(SIZES[rank])))
        gradient_cache.backward(lambda b: model(*b), batches, part, model=model)
        assert len(exchanged) == len(set(exchanged)) > 0, f"exchanged {exchanged}"
        compare(gradients(model, loss), expected, name)
        towers_of_their_own(image[mine], text[mine], loss, part, expected)


def compare(found, expected, what):
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-10, atol=1e-12, msg=lambda m, k=key: f"{what} {k}: {m}")


def towers_of_their_own(image, text, loss, part, expected):
    """Checks micro-batches of another size in each tower, with a wrapper for each tower and with one for both: ranks exchange
    all gradients once a step."""
    whole, shared = Model().double(), OneAtATime().double()
    image_tower = DistributedDataParallel(Tower(whole.image))
    text_tower = DistributedDataParallel(Tower(whole.text, whole.logit_scale))
    both = DistributedDataParallel(shared)
    for_unused = DistributedDataParallel(OneAtATime().double(), find_unused_parameters=True)
    towers = dict.fromkeys(("image", "text"), for_unused)
    with pytest.raises(ValueError, match="model: expected find_unused_parameters=False of a wrapper that both towers share"):
        gradient_cache.backward(towers, {"image": [image], "text": [text]}, part, model=for_unused)
    exchanged = []

    def counting(state, bucket):
        exchanged.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    for wrapper in (image_tower, text_tower, both):
        wrapper.register_comm_hook(None, counting)
    scaled = lambda features, scale: {"text": features, "scale": scale}  # noqa: E731
    encode = {"image": image_tower, "text": lambda b: scaled(*text_tower(b))}
    of_both = {"image": lambda b: both(image=b), "text": lambda b: scaled(*both(text=b))}
    forms = {
        "two wrappers": (whole, nn.ModuleList([image_tower, text_tower]), encode),
        "one wrapper": (shared, both, of_both),
    }
    inputs, of_named = {"image": image, "text": text}, lambda image, text, scale: part(image, text, scale)
    for (name, (bare, model, encode)), sizes in itertools.product(forms.items(), ((4, 3), (4, N), (N, 3), (N, N))):
        bare.zero_grad()
        loss.zero_grad()
        exchanged.clear()
        batches = {tower: t.split(size) for (tower, t), size in zip(inputs.items(), sizes)}
        gradient_cache.backward(encode, batches, of_named, model=model)
        what = f"{name}, micro-batches of {sizes}"
        assert sum(exchanged) == sum(p.numel() for p in bare.parameters()), f"{what} exchanged {exchanged}"
        compare(gradients(bare, loss), expected, what)
