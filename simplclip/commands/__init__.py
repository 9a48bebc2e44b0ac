"""The command `simplclip`: each file adds a command to app.py, main.py joins them; options.py has
the options that they share.
"""
