"""This library in open_clip: its losses, its loading of models, and its own trainer."""
