"""Attention: its IR, its meaning, its operator, and its numbers."""
