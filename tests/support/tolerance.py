"""The tolerance of every kernel test (simplclip.selftest.compare), for dicts of results."""

from simplclip.selftest.compare import EPS, deviation


def assert_within(kernel, plain, truth, dtype, what="", least=0.0):
    """Each argument a dict of tensors with the same keys: the kernel's, plain torch's in `dtype`, and float64's.

    `least`: what the largest value of a result is taken for at least; for results that are 0 by cancellation.
    """
    assert kernel.keys() == truth.keys() == plain.keys()
    for name, exact in truth.items():
        assert kernel[name].shape == exact.shape, f"{what} {name}: shape {kernel[name].shape}, expected {exact.shape}"
        found = deviation(kernel[name], plain[name], exact, EPS[dtype], least)
        assert found.units <= 1, f"{what} {name}: {found}"
