"""Measures the effect of each part of a recipe: trains a model without and with each change of settings, for several seeds.

python -m benchmarks.ablation examples/emoji/siclip-lite0.yaml --effects emoji --out runs/ablation --seeds 3 --jobs 2

emoji.yaml      the effects of the demo's recipe
effects.py      reads an effects file and lists the runs that it needs
run.py          does each run in a process of worker.py, and goes on where an earlier command stopped
tables.py       tables and picture of the finished runs
"""
