"""The kernels of a step of a timm model on fake tensors, as timm's benchmark.py runs it in AMP."""

from __future__ import annotations

from collections import Counter as Bag

import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn, use_fused_attn
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from simplclip.plan import fake
from simplclip.plan.count import Counter
from simplclip.plan.kernels import Kernel

CUDA = torch.device("cuda", 0)


def created(name: str, size: int) -> nn.Module:
    """Returns a model on the meta device, or on the CPU if it reads values while it is made."""
    for device in ("meta", "cpu"):
        for options in ({"img_size": size}, {}):
            try:
                with torch.device(device):
                    return timm.create_model(name, **options)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
            except (NotImplementedError, RuntimeError):
                if device == "cpu":
                    raise
                break
    raise AssertionError("unreachable")


def kernels(name: str, batch: int, size: int, mode: str, layout: str) -> list[Kernel]:
    """Returns the kernels of a step, equal ones as one. mode: "train" or "infer". layout: "nchw" or
    "nhwc".

    Training has attention of plain products, as torch 1.12 had; and SGD with momentum.
    """
    fused = use_fused_attn()
    set_fused_attn(mode == "infer")
    try:
        model = created(name, size).train(mode == "train")
        return _merged(_counted(model, batch, size, layout))
    finally:
        set_fused_attn(bool(fused))


def _counted(model: nn.Module, batch: int, size: int, layout: str) -> list[Kernel]:
    form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    model = model.to(memory_format=form)
    images = torch.empty(batch, 3, size, size, device="meta").contiguous(memory_format=form)
    mode, counter = FakeTensorMode(allow_fallback_kernels=False), Counter(CUDA)
    fakes = fake.faker(mode, CUDA)
    with fake.fake_weights([model], fakes), fake.fake_step(mode, CUDA):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
        for parameter in model.parameters() if model.training else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter)
        inputs, targets = fakes(images), torch.empty(batch, dtype=torch.int64, device=CUDA)
        engine, autocast = fake.Engine(lambda gradient: None), torch.autocast("cuda", torch.float16)
        with engine.installed(), counter.counting(), torch.set_grad_enabled(model.training):
            with autocast:
                out = model(inputs)
                if model.training:
                    F.cross_entropy(out, targets).backward()
            if model.training:
                optimizer.step()
    return counter.usage.kernels


def _merged(kernels: list[Kernel]) -> list[Kernel]:
    """Returns the kernels with the number of each; kernels of torch alone."""
    counts: Bag[tuple] = Bag()
    for k in kernels:
        counts[k.by, k.name, k.dtype, k.rate, k.multiply_adds, k.traffic, k.bytes] += k.times
    return [Kernel(*key, times=n) for key, n in counts.items()]
