"""similarity_loss against open_clip's losses and compiled forms: forward and backward, one process.

    pytest benchmarks/test_similarity_loss.py --sizes 4096,16384 --repeats 5 --write

Every form gets gradients to both features and to the scale. Forms take turns within a round, so that a change of the
machine's speed meets all of them; the figure is the median of the rounds. Extra memory is the allocator's peak above what
was live before, gradients included. `gemms` counts matrix products of N·N·D; `gemm_share` is their time at the rate of
three plain products, measured in the same rounds, over the form's time.
"""

import pytest

from benchmarks.similarity_forms import measure

WIDTH = 512
DENSE_UP_TO = {"contrastive": 16384, "all four": 8192}  # where open_clip's form takes 4 GiB and more


@pytest.mark.parametrize("objective", DENSE_UP_TO)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_similarity_loss(benchmark, rows, request, n, dtype, objective):
    repeats = request.config.getoption("--repeats")
    arguments = (objective, n, WIDTH, dtype, repeats, "cpu", DENSE_UP_TO[objective])
    rows += benchmark.pedantic(measure, args=arguments, rounds=1)
