"""Block low-rank linears: the weight is a grid of blocks, each of low rank (Monarch), or with shared factors (BLAST)."""
