"""parallel_mlp in Triton: launch.py has the launchers."""
