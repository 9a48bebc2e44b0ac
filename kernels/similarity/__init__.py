"""similarity_loss in Triton: op.py has the launchers."""
