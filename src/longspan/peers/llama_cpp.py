"""llama.cpp through llama-cpp-python: prefill and decode of one text after another.

It takes a GGUF file, a window and a number of threads. It is asked `{"tokens": [...], "decode": n}` and answers with
seconds of prefill, the median seconds of a decoded token, and the tokens decoded.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any


def main() -> None:
    """Load the model, say so, and answer measurements until standard input ends."""
    import llama_cpp  # type: ignore[import-not-found]  # only in its own environment

    path, window, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = llama_cpp.Llama(
        path, n_ctx=window, n_threads=threads, n_threads_batch=threads, n_batch=512, n_ubatch=512, verbose=False
    )
    features = llama_cpp.llama_print_system_info().decode()
    say({"version": llama_cpp.__version__, "features": features})
    for line in sys.stdin:
        asked = json.loads(line)
        say(measure(model, asked["tokens"], asked["decode"]))


def measure(model: Any, tokens: list[int], decode: int) -> dict[str, Any]:
    """Read tokens into an empty context, then decode some greedily."""
    model.reset()
    started = time.perf_counter()
    model.eval(tokens)
    token = model.sample(temp=0.0)
    prefill = time.perf_counter() - started
    steps, decoded = [], []
    for _ in range(decode):
        decoded.append(int(token))
        started = time.perf_counter()
        model.eval([token])
        token = model.sample(temp=0.0)
        steps.append(time.perf_counter() - started)
    return {"prefill_s": prefill, "decode_s": statistics.median(steps), "tokens": decoded}


def say(answer: dict[str, Any]) -> None:
    """Write one line of JSON."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
