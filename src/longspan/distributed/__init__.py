"""One context over several ranks: groups of processes, what each holds, and how their partial results become one.

The only room that touches torch.distributed. Ranks are started by torchrun; there is no process manager here.

- `group.py`: the processes, what they say to each other, and how many bytes that takes;
- `layout.py`: which positions of a context each rank holds;
- `merge.py`: partial outputs and their log-sum-exps, merged in float32.
"""
