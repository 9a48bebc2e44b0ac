"""Programs of others with our parts in them: open_clip's trainer."""
