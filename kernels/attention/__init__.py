"""The terms that shaped_attention adds to the softmax attention of another library: op.py has the
launchers.
"""
