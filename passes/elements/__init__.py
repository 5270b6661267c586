"""The element of a tensor at a symbolic index: what masks, repeats and views are proved by."""
