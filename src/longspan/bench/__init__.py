"""What a user or we measure: each module prints a table, or one JSON object."""

from longspan import settings

# A module run with `python -m` imports this first, and torch afterwards.
settings.share_cores()
