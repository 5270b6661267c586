"""`compress_`: dense linear layers of a trained model become block linears."""
