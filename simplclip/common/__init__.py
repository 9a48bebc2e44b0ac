"""Helpers for all packages: errors, files, hardware, generators, ranks, progress and pictures."""
