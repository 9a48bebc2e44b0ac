"""simplified_block: op.py has the public function and composes the block of other ops and of the
norms of norm.py.
"""
