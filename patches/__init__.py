"""What is true of one model family, one file each: all declare `FAMILY`, the same fields in the same order."""
