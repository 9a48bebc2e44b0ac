"""Helpers for all packages: errors, files, hardware, pictures, and parts that other packages register."""
