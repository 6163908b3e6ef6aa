"""`python -m alvts_cli` is `alvts`."""

from .cli import main

main()
