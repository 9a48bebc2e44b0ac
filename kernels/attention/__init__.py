"""The terms of shaped_attention beside the softmax, where another library computes that: op.py has the launchers."""
