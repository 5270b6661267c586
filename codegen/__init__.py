"""The Monarch IR of each family to Triton kernels."""
