"""shaped_attention: op.py is the public function and its registration, reference.py its definition
in plain torch; each backend has a file.
"""
