"""What the compiler did with a model, and what it gains, as a value and as a page."""
