"""The backward pass of plans, on real tensors: gradients are torch's, and nothing stays that torch
frees.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from simplclip.ops import parallel_mlp
from simplclip.plan.fake import Engine


class Net(nn.Module):
    """A convolution with a skip, a shared and a broadcast weight, a fused op, and a checkpointed
    part.
    """

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.shared = nn.Linear(8, 8)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8)
        self.gain, self.unused = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(3))

    def forward(self, x):
        x = self.conv(x)
        x = self.gain * (x + F.relu(self.norm(x))).mean((2, 3))
        x = self.shared(F.gelu(self.shared(x)))
        x = checkpoint(lambda t: torch.tanh(self.shared(t)) * t, x, use_reentrant=False)
        mlp = parallel_mlp(x[None], self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)[
            0
        ]
        return F.normalize(mlp + x, dim=1)


def gradients(module, run):
    module.zero_grad(set_to_none=True)
    run()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def both(module, run):
    """Compares gradients of torch's engine and of this engine, which calls back with each
    parameter's gradient.
    """
    expected, reported = gradients(module, run), []
    with Engine(reported.append).installed():
        got = gradients(module, run)
    torch.testing.assert_close(got, expected)
    assert {name: g.stride() for name, g in got.items()} == {
        name: g.stride() for name, g in expected.items()
    }
    assert {id(g) for g in got.values()} == {id(g) for g in reported}


def test_gradients_of_a_net_with_everything():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(6, 3, 8, 8)
    both(net, lambda: net(x).square()[:, :3].sum().backward())
    both(
        net,
        lambda: torch.autograd.backward([net(x), net.gain], [torch.ones(6, 8), torch.tensor(2.0)]),
    )
    # the second pass adds to existing gradients
    both(net, lambda: [net(x).pow(3).sum().backward() for _ in range(2)])


def test_saved_tensors_go_when_their_node_has_run():
    x = torch.randn(4, requires_grad=True)
    with Engine(lambda gradient: None).installed():
        y = (x.exp() * x).sum()
        y.backward()
        with pytest.raises(RuntimeError, match="whose saved tensors are freed"):
            y.backward()
        with pytest.raises(NotImplementedError, match="expected no retain_graph"):
            (x * x).sum().backward(retain_graph=True)


def test_a_gradient_that_two_nodes_have_is_not_added_to():
    """An addition gives one tensor to both its inputs; one of them is added to before the other
    runs.
    """
    p, q = net = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])

    def by_nodes():
        a = 2 * p
        b = 3 * q
        weights = torch.arange(4.0)
        ((a * weights).sum() + ((a + b) * weights).sum()).backward()

    both(net, by_nodes)
    both(net, lambda: [((p + q) * torch.arange(4.0)).sum().backward() for _ in range(2)])
    assert p.grad.data_ptr() != q.grad.data_ptr()  # gradients of this engine, which runs last
