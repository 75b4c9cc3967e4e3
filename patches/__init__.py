"""What is true of one model family, one file each. Every file declares `FAMILY`, with the same fields in the same order."""
