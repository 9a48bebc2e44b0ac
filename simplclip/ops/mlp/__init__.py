"""parallel_mlp: op.py is the public function and its registration, reference.py its definition in
plain torch.
"""
