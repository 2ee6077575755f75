"""Starting a command once for each GPU of this host, by torchrun's own launcher.

It watches the processes and ends the others when one of them fails. Several nodes are started by torchrun itself, on
each node. It does not know the command.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from longspan.errors import UsageError


def launch(count: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` in `count` processes that share their contexts, and return the exit code.

    Args:
        count: processes, one a GPU; on a machine without any, processes that share its CPU.
        module: what is run.
        arguments: what each is given.

    Raises:
        UsageError: more processes than GPUs.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    if count < 1:
        raise UsageError(f"--gpus {count} is too few: give 1 or more")
    if torch.cuda.is_available() and count > torch.cuda.device_count():
        raise UsageError(f"--gpus {count} is more than the {torch.cuda.device_count()} that are here")
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # What failed is told by the process that failed, in one line.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        # By the loopback's address: a host's own name need not resolve.
        here = ["--standalone", "--local-addr", "127.0.0.1"]
        main([*here, "--nproc-per-node", str(count), "--module", module, *arguments])
    except ChildFailedError as error:
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    except SignalException as error:
        return 128 + int(error.sigval)  # as a shell tells it
    return 0
