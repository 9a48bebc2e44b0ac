"""parallel_mlp in Triton: op.py has the launchers."""
