"""Kernels of block linears."""
