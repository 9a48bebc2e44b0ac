"""Benchmarks and studies; results lie in benchmarks/results.

test_ops.py times ops beside other forms, which losses.py and modules.py have; gpu.py runs all of it
on a GPU. study.py trains the runs of ablation.yaml or finetune.yaml. loader.py and share.py are
programs of their own.
"""
