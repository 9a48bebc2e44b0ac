"""Derivatives beyond a backward: refused by name where a kernel has none, right in the reference; vmap and meta tensors."""

import pytest
import torch
from calls import MODULES, SMALL, module_call
from devices import BACKENDS
from torch.autograd import forward_ad

import simplclip

NAMED = {name: name.split()[0] for name in SMALL}
HOW = r'expected a first derivative in reverse mode, got {}; run the forward under simplclip.backend\("reference"\)'


def tensors_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    make, function = SMALL[name]
    return make(4, dtype), function


@pytest.mark.parametrize("name", SMALL)
def test_double_backward_is_refused(name):
    tensors, function = tensors_of(name)
    leaves = [t for t in tensors if t.requires_grad]
    grads = torch.autograd.grad(function(*tensors), leaves, create_graph=True, allow_unused=True)
    plain = torch.autograd.grad(function(*tensors), leaves, allow_unused=True)
    for got, expected in zip(grads, plain):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected)
    with pytest.raises(RuntimeError, match=f"{NAMED[name]}: {HOW.format('a double backward')}"):
        sum(g.square().sum() for g in grads if g is not None).backward()


@pytest.mark.parametrize("name", SMALL)
def test_forward_mode_is_refused(name):
    tensors, function = tensors_of(name)
    tensors = [t.detach() for t in tensors]
    refused = f"{NAMED[name]}: {HOW.format('torch.func.jvp')}"
    with pytest.raises(NotImplementedError, match=refused):
        torch.func.jvp(function, tuple(tensors), tuple(map(torch.ones_like, tensors)))
    with forward_ad.dual_level():
        function(*tensors)  # without a tangent it runs
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in tensors]
        with pytest.raises(NotImplementedError, match=f"{NAMED[name]}: {HOW.format('a forward-mode tangent')}"):
            function(*duals)
    with pytest.raises(NotImplementedError, match=f"{NAMED[name]}: {HOW.format('torch.func.grad')}"):
        torch.func.grad(function)(*tensors)


@pytest.mark.parametrize("name", SMALL)
def test_the_reference_has_all_derivatives(name):
    tensors, function = tensors_of(name, torch.float64)
    leaves = [t for t in tensors if t.requires_grad]

    def of_leaves(*values):
        values = iter(values)
        return function(*(next(values) if t.requires_grad else t for t in tensors))

    unforced = torch.autograd.grad(of_leaves(*leaves), leaves, allow_unused=True)
    with simplclip.backend("reference"):
        forced = torch.autograd.grad(of_leaves(*leaves), leaves, allow_unused=True)
        assert torch.autograd.gradcheck(of_leaves, leaves, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(of_leaves, leaves, atol=1e-4, fast_mode=True)
    for a, b in zip(unforced, forced):
        if a is None or b is None:
            assert (a if b is None else b) is None or not (a if b is None else b).any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_leaves_has_the_gradients_of_a_loop(name, backend):
    torch.manual_seed(0)
    make, function = SMALL[name]
    both = [make(4, torch.float32) for _ in range(2)]
    stacked = [torch.stack([a.detach(), b.detach()]).requires_grad_(a.requires_grad) for a, b in zip(*both)]
    with simplclip.backend(backend):
        values = torch.vmap(function)(*stacked)
        values.sum().backward()
        for i, tensors in enumerate(both):
            value = function(*tensors)
            value.backward()
            torch.testing.assert_close(values[i].detach(), value.detach())
            for t, leaf in zip(stacked, tensors):
                if leaf.grad is not None:
                    torch.testing.assert_close(t.grad[i], leaf.grad)


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize(
    "name", [name for name in SMALL if not name.endswith(("_loss", "kl", "projection"))] + ["feature_loss"]
)
def test_meta_tensors_give_meta_results_and_gradients(name, backend, monkeypatch):
    monkeypatch.setattr(simplclip.ops.backends, "_forced", backend)
    make, function = SMALL[name]
    with torch.device("meta"):
        tensors = [t.detach().to("meta").requires_grad_(t.requires_grad) for t in make(4, torch.float32)]
        out = function(*tensors)
        assert out.device.type == "meta"
        out.backward()
    for t in tensors:
        assert t.grad is None or (t.grad.device.type == "meta" and t.grad.shape == t.shape)


@pytest.mark.parametrize("name", MODULES)
def test_modules_on_meta(name):
    tensors, function, module = module_call(name, device="meta")
    args = [t.detach().to("meta").requires_grad_(t.requires_grad) for t in tensors(4, torch.float32)]
    out = function(*args)
    assert out.device.type == "meta"
    out.backward()
    assert args[0].grad.shape == args[0].shape
    assert all(p.grad.device.type == "meta" for p in module.parameters())
