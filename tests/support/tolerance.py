"""The tolerance of every kernel test: |kernel - float64| <= |plain torch in the same dtype - float64| + eps.

eps is relative to the largest value of the float64 result. The first term lets a kernel round as plain torch rounds; the
second is what reordering a sum may cost in that dtype. (The rule of ml-cross-entropy's tests.)
"""

import torch

EPS = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float64: 1e-10}
EPS["tf32"] = 2e-3  # the mantissa of float16, to which the inputs are rounded too


def assert_within(kernel, plain, truth, dtype, what="", least=0.0):
    """Each argument a dict of tensors with the same keys: the kernel's, plain torch's in `dtype`, and float64's.

    `least`: what the largest value of a result is taken for at least; for results that are 0 by cancellation.
    """
    assert kernel.keys() == truth.keys() == plain.keys()
    for name, exact in truth.items():
        assert kernel[name].shape == exact.shape, f"{what} {name}: shape {kernel[name].shape}, expected {exact.shape}"
        ours = (kernel[name].double() - exact).abs().max().item()
        theirs = (plain[name].double() - exact).abs().max().item()
        allowed = theirs + EPS[dtype] * max(exact.abs().max().item(), least) + 1e-30
        assert ours <= allowed, f"{what} {name}: error {ours:.3e}, allowed {allowed:.3e} (plain torch {theirs:.3e})"
