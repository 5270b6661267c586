"""The benchmark of whole models: attention and everything around it."""
