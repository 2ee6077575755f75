"""What a model finds, and what it forgets: measured afterwards."""

from longspan import settings

# A module run with `python -m` imports this first, and torch afterwards.
settings.share_cores()
