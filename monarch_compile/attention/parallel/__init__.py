"""Attention over one sequence whose consecutive pieces lie on several ranks."""
