"""Long convolutions: every channel with a filter about as long as the sequence, written with FFTs."""
