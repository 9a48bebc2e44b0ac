"""shaped_attention in Triton: op.py has the launchers."""
