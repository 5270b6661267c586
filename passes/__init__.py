"""FX graphs to the Monarch IR of each family and back."""
