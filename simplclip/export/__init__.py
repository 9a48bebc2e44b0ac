"""Export of checkpoints in other formats: files.py writes and checks the files, onnx_towers.py writes the towers as ONNX."""

from simplclip.export.files import FORMATS, SUMMARY, run
from simplclip.export.onnx_towers import ExportError

__all__ = ["FORMATS", "SUMMARY", "ExportError", "run"]
