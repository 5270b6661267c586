"""FX graphs to the Monarch attention IR and back."""
