"""Executes compiled GPU code, PTX, on a CPU: what a card would get is tested without one."""

from ptx.capture import card

__all__ = ["card"]
