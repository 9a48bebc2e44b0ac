"""A training step of siclip-tiny, see training_forms.py.

OMP_NUM_THREADS=1 pytest benchmarks/test_training.py --repeats 5 --write
"""

import pytest

from benchmarks.training_forms import OBJECTIVES, measure

BATCHES = (192, 1024)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps(benchmark, rows, request, dtype, objective, batch):
    arguments = (objective, batch, dtype, request.config.getoption("--repeats"))
    rows += benchmark.pedantic(measure, args=arguments, rounds=1)
