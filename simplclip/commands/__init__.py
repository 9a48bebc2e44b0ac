"""The command `simplclip`: main.py joins its subcommands, a file each; options.py has the options
that they share.
"""
