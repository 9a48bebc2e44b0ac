"""Which blocks of a pretrained tower are alike, so that simplified blocks in their places may share weights.

likeness.py     the attention maps and outputs of all blocks, compared while the model runs
groups.py       groups of neighbouring blocks for a budget of parameters
picture.py      a heat map of all pairs
report.py       the whole: data, tables, share.json and share.png
"""

from simplclip.sharing.groups import Proposal, parse_budget, propose
from simplclip.sharing.likeness import Likeness, measure
from simplclip.sharing.report import TOWERS, run

__all__ = ["TOWERS", "Likeness", "Proposal", "measure", "parse_budget", "propose", "run"]
