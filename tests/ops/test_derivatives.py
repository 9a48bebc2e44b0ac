"""Derivatives: those beyond a backward are refused by name; gradients under vmap, and of meta
tensors.
"""

import itertools

import pytest
import torch
from torch.autograd import forward_ad

import simplclip
from support.devices import BACKENDS
from support.ops.small_calls import SMALL


def refused(name, got):
    return (
        f"{name.split()[0]}: expected a first derivative in reverse mode, got {got}; the ops have "
        "no other derivatives"
    )


def tensors_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    make, function = SMALL[name]
    return make(4, dtype), function


def of_leaves(tensors, function):
    """Returns a function of the tensors that require a gradient, and these tensors."""

    def of(*values):
        values = iter(values)
        return function(*(next(values) if t.requires_grad else t for t in tensors))

    return of, tuple(t for t in tensors if t.requires_grad)


@pytest.mark.parametrize("name", SMALL)
def test_a_second_derivative_is_refused_whatever_asks_for_it(name):
    function, leaves = of_leaves(*tensors_of(name))
    twice = refused(name, "a double backward")

    def gradients(create_graph):
        results = torch.autograd.grad(
            function(*leaves), leaves, create_graph=create_graph, allow_unused=True
        )
        return {i: g for i, g in enumerate(results) if g is not None}

    first, plain = gradients(True), gradients(False)
    assert first.keys() == plain.keys()
    assert all(torch.equal(first[i], plain[i]) for i in first)
    for i, j in itertools.product(first, first):
        with pytest.raises(RuntimeError, match=twice):
            torch.autograd.grad(first[i].square().sum(), leaves[j], retain_graph=True)
    used, values = [leaves[i] for i in first], tuple(leaves[i].detach() for i in first)
    of_used, _ = of_leaves(
        [t.detach().requires_grad_(any(t is u for u in used)) for t in leaves], function
    )
    with pytest.raises(RuntimeError, match=twice):
        torch.autograd.functional.hvp(of_used, values, values)


@pytest.mark.parametrize("terms", [("pair_matching",), ("contrastive", "pair_matching")])
def test_a_second_derivative_of_the_planes_bias_is_refused(terms):
    """A backward pass to the bias alone takes no other way through the op."""
    image, text = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    bias = torch.tensor(-1.0, requires_grad=True)
    value = sum(
        simplclip.ops.similarity_loss(image, text, 10.0, terms=terms, plane=(3.0, bias)).values()
    )
    (gradient,) = torch.autograd.grad(value, image, create_graph=True)
    with pytest.raises(RuntimeError, match=refused("similarity_loss", "a double backward")):
        torch.autograd.backward(gradient.square().sum(), inputs=[bias])


@pytest.mark.parametrize("name", SMALL)
def test_forward_mode_is_refused(name):
    tensors, function = tensors_of(name)
    tensors = [t.detach() for t in tensors]
    with pytest.raises(NotImplementedError, match=refused(name, "torch.func.jvp")):
        torch.func.jvp(function, tuple(tensors), tuple(map(torch.ones_like, tensors)))
    with forward_ad.dual_level():
        function(*tensors)  # without a tangent, the kernel runs
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in tensors]
        with pytest.raises(NotImplementedError, match=refused(name, "a forward-mode tangent")):
            function(*duals)
    with pytest.raises(NotImplementedError, match=refused(name, "torch.func.grad")):
        torch.func.grad(function)(*tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_leaves_has_the_gradients_of_a_loop(name, backend):
    torch.manual_seed(0)
    make, function = SMALL[name]
    both = [make(4, torch.float32) for _ in range(2)]
    stacked = [
        torch.stack([a.detach(), b.detach()]).requires_grad_(a.requires_grad) for a, b in zip(*both)
    ]
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
    "name",
    [name for name in SMALL if not name.endswith(("_loss", "projection"))] + ["feature_loss"],
)
def test_meta_tensors_give_meta_results_and_gradients(name, backend):
    make, function = SMALL[name]
    tensors = [
        torch.empty_like(t, device="meta", requires_grad=t.requires_grad)
        for t in make(4, torch.float32)
    ]
    with simplclip.backend(backend or None), torch.device("meta"):
        out = function(*tensors)
        assert out.device.type == "meta"
        out.backward()
    for t in tensors:
        assert t.grad is None or (t.grad.device.type == "meta" and t.grad.shape == t.shape)
