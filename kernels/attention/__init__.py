"""The terms that shaped_attention adds to the softmax attention of another library, in Triton:
launch.py has the launchers.
"""
