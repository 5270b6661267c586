"""The benchmark of long convolutions: every way to compute one, side by side."""
