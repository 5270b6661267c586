"""The Monarch attention IR to Triton kernels."""
