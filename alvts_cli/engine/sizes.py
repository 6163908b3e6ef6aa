"""Sizes that are fixed, or follow from a model's width."""

ROWS = 32
"""Tokens that ask for visual ones, at most."""


def default_rank(hidden_size: int) -> int:
    """`R` where nobody asks for another: a quarter of the paper's (256 for a width of 4096, 128 for
    2048), and no less than 24. Measured in `calibration/README.md`."""
    return max(24, hidden_size // 64)


def paper_rank(hidden_size: int) -> int:
    """The paper's `R`: 256 for a width of 4096, 128 for 2048; and no less than 16."""
    return max(16, hidden_size // 16)


def default_carry_rank(hidden_size: int) -> int:
    """`R` of the carried update: a 32nd of the width, and no less than 32. What was tried
    stands in `calibration/README.md`; for wide models it is a guess."""
    return min(hidden_size, max(32, hidden_size // 32))
