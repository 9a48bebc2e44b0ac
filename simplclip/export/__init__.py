"""Export of checkpoints in other formats: files.py writes and checks the files, onnx_towers.py writes the towers as ONNX."""

from simplclip.export.errors import ExportError
from simplclip.export.files import FORMATS, SUMMARY, run

__all__ = ["FORMATS", "SUMMARY", "ExportError", "run"]
