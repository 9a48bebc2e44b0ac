"""What the parts of a recipe change: trains a model without and with each change of its settings, several seeds each.

python -m benchmarks.ablation siclip-lite0-emoji --effects emoji --out runs/ablation --seeds 3 --jobs 2

emoji.yaml      the effects of the demo's recipe
effects.py      reads an effects file: which runs it needs
run.py          does the runs, each a process of worker.py, and goes on where an earlier command stopped
tables.py       tables and picture of what is done
"""
