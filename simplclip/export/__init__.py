"""Checkpoints in the formats of others: files.py writes and checks them, onnx_towers.py has the towers as ONNX."""

from simplclip.export.errors import ExportError
from simplclip.export.files import FORMATS, SUMMARY, run

__all__ = ["FORMATS", "SUMMARY", "ExportError", "run"]
