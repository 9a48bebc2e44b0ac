"""Values and gradients of memeff's and siglip-kernel's own kernels on a CPU, for tests/losses/test_peers.py.

Triton interprets the kernels (TRITON_INTERPRET=1). Both packages ask for a GPU's compute capability, by which they choose
tiles; they are told that of an A100.
"""

import sys

import torch


def memeff(x, y, case):
    from memeff import clip_loss

    clip_loss._validate_features = lambda x, y: None  # which accepts only CUDA tensors
    tau_plus = case.pop("tau_plus", None)
    return clip_loss.MemoryEfficientCLIPLoss(normalized_inputs=True, stable=False, **case)(x, y, tau_plus=tau_plus)


def siglip_kernel(x, y, scale, bias, case):
    from siglip_kernel import fused_siglip_plus_loss

    return fused_siglip_plus_loss(x, y, scale.log(), bias, **case)


if __name__ == "__main__":
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    function = {"memeff": memeff, "siglip_kernel": siglip_kernel}[sys.argv[1]]
    results = []
    for *leaves, case in torch.load(sys.argv[2]):
        leaves = [t.requires_grad_() for t in leaves]
        value = function(*leaves, case)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    torch.save(results, sys.argv[3])
