"""`python -m simplclip` is the command `simplclip`; torchrun needs a module."""

from simplclip.commands.main import main

if __name__ == "__main__":
    main()
