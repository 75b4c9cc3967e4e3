"""Groups of ranks, their mesh, and the memory that GPUs write into directly."""
