"""Kernels of fastres' own, for what torch has none for, or slower ones."""
