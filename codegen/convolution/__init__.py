"""Kernels of long convolutions."""
