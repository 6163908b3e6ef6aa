"""How smol's adapter was trained: `train`. No part of the wheel."""
