"""Transforms of encoded images."""


class ImageTransform:
    """Takes the place of the one that is being written."""
