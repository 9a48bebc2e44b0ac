"""feature_loss: op.py has it all."""
