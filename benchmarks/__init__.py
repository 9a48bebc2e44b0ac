"""Microbenchmarks: `make bench`.

Result files, with the hardware and the commit, lie in benchmarks/results.
"""
