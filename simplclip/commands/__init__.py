"""Groups of the command line's commands, which cli.py joins."""
