"""The speed benchmark: attention alone, every form side by side."""
