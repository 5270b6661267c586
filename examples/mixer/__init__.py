"""Models whose tokens are mixed by long convolutions, and a BERT to compare them with."""
