"""Block linears: found in a graph, proved, and lowered."""
