"""Which column tiles grad_hidden and grad_weight compute at half width.

The last one, where what is left of the columns fills at most half of it: a whole tile would multiply the rest for
nothing. Only of wide tiles: half of a narrower one would take nearly as long, since it waits for shared memory.
"""

_WIDE = 256
_KERNELS = ("grad_hidden", "grad_weight")


def has_half_tile(kernel: str, columns: int, block_n: int) -> bool:
    """Whether `kernel` computes the last of the tiles that cover `columns` at half width."""
    return kernel in _KERNELS and block_n >= _WIDE and 0 < columns % block_n <= block_n // 2


def computed_columns(kernel: str, columns: int, block_n: int) -> int:
    """How many columns the tiles that cover `columns` have."""
    half = block_n // 2 if has_half_tile(kernel, columns, block_n) else 0
    return -(-columns // block_n) * block_n - half
