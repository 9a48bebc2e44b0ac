"""Launches, torch's kernels, bytes and copies from the host of similarity_loss on a GPU, on fake tensors."""

import pytest
import torch
from interpreter import needs_triton

pytestmark = needs_triton


def shapes(n: int, width: int = 512, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    features = {name: torch.empty(n, width, dtype=dtype, device="meta") for name in ("image", "text")}
    return features | {"logit_scale": torch.empty((), device="meta")}


@pytest.mark.parametrize(("n", "most"), [(65536, 9e9), (131072, 30e9)])
def test_bytes_of_large_batches(n, most):
    """Those of features and gradients. The blocks of G, which are written once and read by two products, are besides them."""
    from traces import trace

    from simplclip.kernels.similarity.launch import block_sides

    rows, columns = block_sides(n, n, (128 << 20) // 2)
    found = trace(shapes(n))
    features = 2 * n * 512 * (-(-n // rows) + -(-n // columns))  # that the kernel of each block reads
    assert found.bytes + features < most
    assert found.launches["_similarity_gradient_kernel"] == -(-n // rows) * -(-n // columns)


@pytest.mark.parametrize(("n", "m", "elements"), [(1, 1, 1), (300, 7, 0), (65536, 65536, 1 << 25), (5000, 131072, 1 << 26)])
def test_sides_of_blocks(n, m, elements):
    from simplclip.kernels.similarity.launch import SIDE, block_sides

    rows, columns = block_sides(n, m, elements)
    assert 0 < rows <= n
    assert 0 < columns <= m
    assert rows == n or rows % SIDE == 0
    assert columns == m or columns % SIDE == 0
    assert rows * columns <= max(elements, SIDE * SIDE)
    if rows < n and columns < m and elements > SIDE * SIDE:
        assert 0.8 < rows / columns < 1.25
