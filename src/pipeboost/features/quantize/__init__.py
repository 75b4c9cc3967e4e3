"""Linears in 8 bits; refused in this version."""
