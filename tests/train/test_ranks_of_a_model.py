"""What several ranks share of a model: statistics of batch norms, gradients of its towers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from simplclip.common import ranks
from simplclip.train import objective
from simplclip.train.config import ConfigError


def test_batch_norms_share_their_statistics_or_would_drift(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(
        ConfigError,
        match=r"model.freeze_norms: expected true for several ranks on a cpu.*BatchNorm1d '0'",
    ):
        objective.share_norms(nn.Sequential(nn.BatchNorm1d(2)), torch.device("cpu"))
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval())
    weight = model[0].weight
    objective.share_norms(model, torch.device("cuda"))
    assert [type(norm) for norm in model] == [nn.SyncBatchNorm, nn.BatchNorm1d]
    assert model[0].weight is weight


def test_the_towers_that_train_are_wrapped_apart(monkeypatch):
    """Frozen parts do not travel; a tower may have unused parameters."""
    monkeypatch.setattr(ranks, "count", lambda: 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        names = ("visual", "text", "never", "frozen")
        model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
        model["frozen"].requires_grad_(False)
        model.logit_scale = nn.Parameter(torch.tensor(3.0))
        wrappers = objective.wrap(model)
        sizes = {tower: len(list(wrapper.parameters())) for tower, wrapper in wrappers.items()}
        assert sizes == {"image": 2, "text": 4}
        encode = {
            tower: lambda x, t=tower, m=name: wrappers[t](model[m], x)
            for tower, name in (("image", "visual"), ("text", "text"))
        }
        for _ in range(3):  # a second step would fail if every parameter had to be used
            model.zero_grad()
            scale = objective.average_gradient(model.logit_scale)
            x, y = (encode[tower](torch.ones(4, 2)) for tower in ("image", "text"))
            (scale * (x * y).sum()).backward()
            assert model["never"].weight.grad is None
            assert model["visual"].weight.grad is not None
        assert objective.average_gradient(None) is None
        assert model.logit_scale.grad is not None
    finally:
        dist.destroy_process_group()
