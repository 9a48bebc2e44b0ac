"""The tolerance of every kernel test (compare), for dicts of results."""

from compare import EPS, error_of


def assert_within(kernel, plain, truth, dtype, what="", least=0.0):
    """Each argument a dict of tensors with the same keys: the kernel's, plain torch's in `dtype`, and float64's.

    `least`: what the largest value of a result is taken for at least; for results that are 0 by cancellation.
    """
    assert kernel.keys() == truth.keys() == plain.keys()
    for name, exact in truth.items():
        assert kernel[name].shape == exact.shape, f"{what} {name}: shape {kernel[name].shape}, expected {exact.shape}"
        allowed = error_of(plain[name], exact) + EPS[dtype] * max(exact.abs().max().item(), least) + 1e-30
        error = error_of(kernel[name], exact)
        assert error <= allowed, f"{what} {name}: error {error:.3e}, allowed {allowed:.3e}"
