"""Examples, run from a checkout: ``python -m examples.demo``, ``.monarch_mixer`` or ``.train_recall``."""
