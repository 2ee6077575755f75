"""One layer's attention, measured: `longspan bench attention`. `run.py` says what is done, in which order."""
