"""The calls of the ops: one dataclass of the tensors and options of each, below ops and kernels.

From them the ops' schemas are made (fields.py), and by the build the structs and enums of C++
(csrc/call_headers.py).
"""
