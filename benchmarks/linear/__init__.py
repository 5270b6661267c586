"""The benchmark of block linears: dense layers, batched products and the operator's forms, side by side."""
