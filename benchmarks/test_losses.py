"""The losses against open_clip's and compiled forms: forward and backward, one process.

    pytest benchmarks/test_losses.py -k similarity --repeats 3 --write
    OMP_NUM_THREADS=1 pytest benchmarks/test_losses.py -k sigmoid --sizes 1024,4096,16384 --write

Every form gets gradients to both features, the scale and the bias. Extra memory is the allocator's
peak above what was live before, gradients included. `gemms` counts matrix products of N·N·D;
`gemm_share` is their time at the rate of three plain products, measured in the same rounds, over
the form's time.
"""

import pytest

from benchmarks.similarity_forms import Problem, measure

WIDTH = 512
# op of the result file, objective: largest N of the dense forms, where one of their matrices takes
# about 1 GiB
CASES = {
    ("similarity_loss", "contrastive"): 16384,
    ("similarity_loss", "all four"): 8192,
    ("sigmoid_loss", "sigmoid"): 16384,
}


@pytest.mark.parametrize(("op", "objective"), CASES, ids=[", ".join(case) for case in CASES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses(measured, n, dtype, op, objective):
    problem = Problem(op, objective, n, WIDTH, dtype)
    measured(measure, problem, CASES[op, objective], "cpu")
