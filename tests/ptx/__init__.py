"""Executes compiled GPU code, PTX, on a CPU: what a card would get is tested without one."""

from ptx.capture import card
from ptx.variants import fused, noisy

__all__ = ["card", "fused", "noisy"]
