"""Helpers for all packages: errors, files, hardware, ranks, progress and pictures."""
