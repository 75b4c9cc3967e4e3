"""Attention kernels and the table of them; nothing that only a GPU has is imported before its first use."""
