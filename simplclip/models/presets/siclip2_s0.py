"""siclip2-s0: MobileCLIP2-S0 with simplified blocks; pairs of text blocks share their weights."""

from functools import partial

import open_clip

from simplclip.models.presets import mobileclip_s0
from simplclip.models.spec import Spec
from simplclip.nn import neighbour_groups

# The text tower carries most of MobileCLIP2-S0's parameters, and neighbouring layers of a trained
# CLIP text tower do nearly the same; so its 12 blocks share weights in pairs. The two blocks of the
# last image stage do not share. Masking padding lost no recall in a tower of this shape. siclip-s0
# masks none: its inherited convolutions read it.
SPEC = Spec(
    open_clip.get_model_config("MobileCLIP2-S0"),
    partial(open_clip.get_tokenizer, "MobileCLIP2-S0"),
    simplify={"share": {"text": neighbour_groups(12, 2)}, "mask_padding": True},
    preprocess=mobileclip_s0.SPEC.preprocess,
)

CONFIG = r"""
# As siclip-s0, with whose commands (and --config siclip2-s0) its data are prepared, but a student
# of MobileCLIP2-S0: open_clip downloads the weights once, unless --set inherit.source=FILE names
# them.
# Without a teacher: --set data.sidecars=[] and loss.feature_weight, loss.relational_weight,
# loss.interactive_weight 0.

model:
  name: siclip2-s0

inherit:
  source: MobileCLIP2-S0/dfndr2b
  blocks: first
  train: [visual.trunk.head, text.ln_final, text.text_projection]

data:
  train: cc12m/*.tar
  sidecars: [cc12m-captions, cc12m-teacher]
  captions_per_image: 2
  batch_size: 4096
  micro_batch: 256
  workers: 8

loss:
  feature_weight: 0.78125
  relational_weight: {value: 1.0, start: 10000}
  interactive_weight: {value: 1.0, start: 20000}
  pm_weight: 0.3

optim:
  lr: 1.0e-3
  warmup: 500
  weight_decay: 0.2

run:
  out: runs/siclip2-s0
  steps: 30000  # ten times over 12 million pairs
  precision: bf16
"""
