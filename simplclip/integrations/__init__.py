"""This library in other programs: open_clip and its trainer, transformers, and clip-benchmark."""
