"""Steps of open_clip's trainer: the loss of the model, and a peak that is predicted as ours is."""

from functools import partial

import pytest
import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss

from benchmarks.steps import OpenClipStep
from simplclip.plan.actual import peak_bytes
from simplclip.plan.measure import predict

CPU = torch.device("cpu")
WITHIN = {"fp32": 0.01, "bf16": 0.02}  # oneDNN's memory in bfloat16 products is not counted


@pytest.mark.prove
@pytest.mark.parametrize(
    ("precision", "teacher_width"), [("fp32", None), ("bf16", None), ("bf16", 512)]
)
def test_predicted_peak_of_vit_b_32(precision, teacher_width):
    step = OpenClipStep("open_clip:ViT-B-32", 24, precision, teacher_width)
    predicted = predict(step, CPU).peak
    assert predicted == pytest.approx(peak_bytes(step, CPU), rel=WITHIN[precision])


def test_the_loss_is_that_of_the_model():
    """SigLipLoss has no form with a teacher, and needs a bias, which the model lacks by default."""
    step = partial(OpenClipStep, "open_clip:RN50", 4, "fp32")
    losses = [type(made.loss) for made in (step(), step(256), step(init_logit_bias=-10.0))]
    assert losses == [ClipLoss, DistillClipLoss, SigLipLoss]
