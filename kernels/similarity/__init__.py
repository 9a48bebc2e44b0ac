"""similarity_loss in Triton: launch.py has the launchers."""
