"""The sigmoid loss against open_clip's SigLipLoss, compiled forms and siglip-kernel's reference, beside the contrastive loss.

    OMP_NUM_THREADS=1 pytest benchmarks/test_sigmoid_loss.py --sizes 1024,4096,16384 --repeats 5 --write

Measures as test_similarity_loss.py does, with a gradient of the bias too. siglip-kernel's reference is measured where the
package is installed. memeff has no sigmoid loss, and its contrastive loss needs a GPU: see `python -m benchmarks.gpu`.
"""

import pytest

from benchmarks.similarity_forms import measure

WIDTH = 512
DENSE_UP_TO = 16384  # above, open_clip's form takes 10 GiB in bfloat16 and 20 in float32


@pytest.mark.parametrize("objective", ["sigmoid", "contrastive"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sigmoid_loss(benchmark, rows, request, n, dtype, objective):
    repeats = request.config.getoption("--repeats")
    arguments = (objective, n, WIDTH, dtype, repeats, "cpu", DENSE_UP_TO, "sigmoid_loss")
    rows += benchmark.pedantic(measure, args=arguments, rounds=1)
