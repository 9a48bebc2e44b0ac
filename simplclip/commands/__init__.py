"""The command `simplclip`: main.py puts it together of its commands, a file each; options.py is what they share."""
