"""A measured corpus: programs with attention in every spelling we know of, each with its golden outcome."""
