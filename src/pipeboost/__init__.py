"""pipeboost: one line gives a stock Diffusers pipeline the speed of a dedicated engine."""
