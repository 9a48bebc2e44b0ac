"""Commands of `simplclip.cli` with many options, and options that several commands share."""
