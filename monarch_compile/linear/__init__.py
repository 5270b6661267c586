"""Block low-rank linears: the weight is a grid of blocks of low rank (Monarch), or of shared factors (BLAST)."""
