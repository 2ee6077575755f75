"""Asking an endpoint in place of a model here: what the options of an eval say of it. It loads nothing heavy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan import settings
from longspan.cli.eval_options import Shared
from longspan.cli.progress import Progress
from longspan.errors import UsageError

if TYPE_CHECKING:
    from longspan.evals.endpoint.asker import Endpoint
    from longspan.evals.endpoint.client import Client

_OF_A_MODEL_HERE = ("attention", "mechanisms", "budgets", "prefill", "kv", "kv_budget", "device", "dtype", "adapter")
_OF_AN_ENDPOINT = ("completions", "parallel", "timeout", "tokenizer", "api_key_env", "api_key_file")


def check(given: Shared) -> None:
    """Refuse options that say nothing of who is asked (UsageError)."""
    changed = [f.name for f in dataclasses.fields(given) if getattr(given, f.name) != f.default]
    if given.base_url is None:
        if wrong := [name for name in changed if name in _OF_AN_ENDPOINT]:
            raise UsageError(f"{_options(wrong)} is for an endpoint: name it with --base-url")
        return
    if wrong := [name for name in changed if name in _OF_A_MODEL_HERE]:
        raise UsageError(f"{_options(wrong)} is for a model that runs here: leave it out with --base-url")
    if given.parallel < 1:
        raise UsageError(f"--parallel {given.parallel} asks nothing: give at least 1")
    if not given.timeout > 0:
        raise UsageError(f"--timeout {given.timeout:g} leaves no time: give more than 0")


def endpoint(given: Shared, progress: Progress) -> tuple[Client, Endpoint, dict[str, Any], list[str]]:
    """Return the client, to be closed, who is asked, the environment of the run, and what the user should know.

    Raises:
        UsageError: an option that can't be used, or no model was named where there are several.
        EndpointError: it can't be reached, refuses the key, or does not have the model.
    """
    assert given.base_url is not None, "there is an endpoint"
    from longspan.evals.endpoint.client import Client

    client = Client(given.base_url, _key(given), parallel=given.parallel, timeout=given.timeout, tell=progress.say)
    try:
        progress.busy(f"asking {client.url} for its models")
        model = client.model(given.model)
        progress.busy("loading the tokenizer")
        from longspan.evals.endpoint.asker import Endpoint
        from longspan.evals.environment import environment
        from longspan.hf.loading import load_tokenizer, pick_device

        tokenizer = load_tokenizer(given.tokenizer or settings.DEFAULT_MODEL, say=progress.say)
        asker = Endpoint(client, model, tokenizer, raw=given.completions, parallel=given.parallel)
        about = environment(pick_device("cpu"), "", [])
        del about["threads"]
        about |= {"device": f"the endpoint {client.url}", "model": model, "tokenizer": Path(tokenizer.name).name}
    except BaseException:
        client.close()
        raise
    notes = []
    if given.tokenizer is None:
        notes.append(f"lengths are counted by the tokenizer of {tokenizer.name}: name the model's own with --tokenizer")
    return client, asker, about, notes


def _key(given: Shared) -> str:
    """Return the key (UsageError: there is none where it should be, or it is no key)."""
    if given.api_key_file is None:
        key = settings.api_key(given.api_key_env)
    elif given.api_key_env is not None:
        raise UsageError("--api-key-env and --api-key-file both say where the key is: give one of the two")
    else:
        try:
            key = Path(given.api_key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise UsageError(f"can't read the key in {given.api_key_file}: {reason}") from error
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise UsageError("the key has characters that no key has: it must be one word")
    return key


def _options(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
