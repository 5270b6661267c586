"""Which tokens of one sequence each rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from monarch_compile.errors import InputError


@dataclass(frozen=True)
class Spread:
    """One sequence in consecutive pieces of whole blocks, one piece a rank, the last ones shorter where tokens run out.

    seq_len: tokens of the whole sequence. ranks: how many hold it. block_size: tokens in a block.
    prefix: leading tokens that lie in no block, on the first rank beside its piece; trailing ones, on the last rank,
        with prefix_at_end.

    Raises:
        InputError: a number is out of range.
    """

    seq_len: int
    ranks: int
    block_size: int
    prefix: int = 0
    prefix_at_end: bool = False

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.block_size < 1:
            raise InputError(f"ranks and block_size must be at least 1; found {self.ranks} and {self.block_size}")
        if not 0 <= self.prefix < self.seq_len:
            raise InputError(f"prefix must be below seq_len {self.seq_len} and at least 0; found {self.prefix}")

    @property
    def num_blocks(self) -> int:
        """Blocks that hold tokens."""
        return -(-(self.seq_len - self.prefix) // self.block_size)

    @property
    def blocks_of_rank(self) -> int:
        """Blocks of each rank, those without a token among them."""
        return -(-self.num_blocks // self.ranks)

    @property
    def places(self) -> int:
        """Tokens that the blocks of a rank have room for."""
        return self.blocks_of_rank * self.block_size

    @property
    def has_empty_places(self) -> bool:
        """Whether some rank has places without a token."""
        return self.seq_len - self.prefix < self.ranks * self.places

    @property
    def prefix_rank(self) -> int:
        """The rank that holds the prefix."""
        return self.ranks - 1 if self.prefix_at_end else 0

    def prefix_of(self, rank: int) -> int:
        """Tokens of the prefix that a rank holds."""
        return self.prefix if rank == self.prefix_rank else 0

    def rest_of(self, rank: int) -> int:
        """Tokens outside of the prefix that a rank holds."""
        return max(0, min(self.places, self.seq_len - self.prefix - rank * self.places))

    def tokens_of(self, rank: int) -> int:
        """All tokens that a rank holds."""
        return self.rest_of(rank) + self.prefix_of(rank)

    def start_of(self, rank: int) -> int:
        """The position in the sequence of a rank's first token."""
        return sum(self.tokens_of(before) for before in range(rank))

    def require_piece(self, rank: int, tokens: int) -> None:
        """Raise InputError unless a rank's tensors have as many tokens as it holds."""
        wanted = self.tokens_of(rank)
        if tokens != wanted:
            raise InputError(
                f"rank {rank} of {self.ranks} must hold {wanted} tokens of the {self.seq_len} ({self.blocks_of_rank} "
                f"blocks of {self.block_size}, prefix {self.prefix_of(rank)}; SequenceParallel.shard cuts so); "
                f"found {tokens}"
            )


def even_block_size(piece: int, most: int) -> int:
    """The largest block size, at most `most`, of which equal pieces of so many tokens are whole blocks.

    Raises:
        InputError: it would be less than half of `most`.
    """
    found = max(size for size in range(1, min(piece, most) + 1) if piece % size == 0)
    if 2 * found < min(piece, most):
        raise InputError(
            f"pieces of {piece} tokens are no whole blocks of {(most + 1) // 2} to {most} tokens: give block_size, or "
            "give seq_len and cut the sequence by SequenceParallel.shard"
        )
    return found
