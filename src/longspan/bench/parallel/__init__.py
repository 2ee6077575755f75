"""One layer's attention over several ranks, measured: `torchrun ... -m longspan.bench.parallel`; see `run.py`."""
