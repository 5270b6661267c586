"""Long convolutions in a graph: matching, checks, lowering."""
