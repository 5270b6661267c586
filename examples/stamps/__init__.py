"""A classifier of pictures to fine-tune: DINOv2 with a head on Tux Paint's stamps, and a tiny stand-in."""
