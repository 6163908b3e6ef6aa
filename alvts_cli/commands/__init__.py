"""The commands, one file each: options in, text out. The work is done elsewhere."""
