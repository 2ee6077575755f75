"""Finding and loading a model: short name, GGUF file, local folder or hub name.

A GGUF file is converted once and the result kept in the cache, since converting takes far longer than loading.
It does not know how a model is run: see `model.py`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from longspan import settings
from longspan.errors import LongspanError, ModelError, UnknownNameError, UsageError
from longspan.hf import adapter as adapters
from longspan.hf import attention, catalogue, hybrid
from longspan.hf.model import CausalModel
from longspan.hf.one_token import use_one_token_linear
from longspan.hf.tokenizer import Tokenizer

Say = Callable[[str], None]
WEIGHTS = ("auto", "own", "int8")
"""How weights may be read in decode; see `load`."""


def pick_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda` (UsageError for another, or where it is missing)."""
    if name not in ("auto", "cpu", "cuda") and not name.startswith("cuda:"):
        raise UsageError(f"unknown device {name!r}: use auto, cpu or cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("no CUDA device is available here: use --device cpu")
    return torch.device(name)


def pick_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies it natively, else float32.

    On CPUs without AVX512-BF16 or AMX, bfloat16 is several times slower than float32.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = (
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    )
    return torch.bfloat16 if native else torch.float32


def load(
    name: str,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    weights: str = "auto",
    adapter: str | None = None,
    say: Say = lambda _: None,
) -> CausalModel:
    """Load a model and its tokenizer.

    Args:
        name: a short name of the catalogue, a GGUF file, a folder with config.json, or a hub name `owner/model`.
        device: `auto`, `cpu` or `cuda`.
        dtype: None: chosen for the device.
        weights: how a CPU that decodes in bfloat16 reads them, where the model is a plain decoder (`decoder.py`):
            `auto`, in 4 or 8 bits where they lie on such a grid (a GGUF file's) and nothing is lost; `own`, as they
            are; `int8`, all in 8 bits, 4 times what rounding to bfloat16 loses. Documents are read with them as they
            are.
        adapter: the folder of an adapter that was trained on this model (`hf.adapter`); None: as it is.
        say: told in a line what takes long.

    Raises:
        UnknownNameError: nothing of that name.
        ModelError: it can't be fetched, read or run by Longspan, or the adapter is of another model.
        UsageError: no such device, or another word for `weights`.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"unknown weights {weights!r}: use one of {', '.join(WEIGHTS)}")
    on = pick_device(device)
    dtype = dtype or pick_dtype(on)
    added = None if adapter is None else adapters.read(adapter)
    source = _source(name, say)
    attention.register()
    with _quiet() as told:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=attention.NAME)
        except Exception as error:
            raise ModelError(f"can't load {name}: {_first_line(error)}") from error
        del told
    model = model.to(on).eval()
    use_one_token_linear(model)
    if added is None:
        return CausalModel(name, model, tokenizer, weights)
    if (own := CausalModel(name, model, tokenizer, weights, native=False).fingerprint) != added.model:
        raise ModelError(
            f"the adapter {adapter} was trained on other weights than {name}'s ({added.model[:8]}, not {own[:8]}): "
            "name the model that it was trained on"
        )
    adapters.merge(added, model, str(adapter))
    return CausalModel(name, model, tokenizer, weights, adapter=added.to(on))


def load_tokenizer(name: str, *, say: Say = lambda _: None) -> Tokenizer:
    """Load a model's tokenizer alone; arguments as for `load`.

    A folder needs the tokenizer's files only, and of a GGUF file nothing is converted.

    Raises:
        UnknownNameError: nothing of that name.
        ModelError: it can't be fetched or read.
    """
    path = Path(name).expanduser()
    if name in catalogue.CATALOGUE:
        path = catalogue.fetch(catalogue.entry(name), say)
    with _quiet():
        from transformers import AutoTokenizer

        try:
            if path.is_file() and path.suffix.lower() == ".gguf":
                return Tokenizer(name, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))
            return Tokenizer(name, AutoTokenizer.from_pretrained(path if path.is_dir() else _source(name, say)))
        except LongspanError:
            raise
        except Exception as error:
            raise ModelError(f"can't load the tokenizer of {name}: {_first_line(error)}") from error


def plain_transformers(model: CausalModel) -> Any:
    """Return the same weights as transformers runs them by itself (sdpa attention, its own cache), to compare with."""
    with _quiet():
        from transformers import AutoModelForCausalLM

        source = model.model.config._name_or_path
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=model.dtype, attn_implementation="sdpa")
    hybrid.free_time_steps(model.name, plain, plain.config.get_text_config())
    if model.adapter is not None:
        adapters.merge(model.adapter, plain, model.name)
    return plain.to(model.device).eval()


def _source(name: str, say: Say) -> str:
    """Return what transformers can load: a folder, or a hub name."""
    if name in catalogue.CATALOGUE:
        return str(_converted(catalogue.fetch(catalogue.entry(name), say), say))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name} is no model: give a GGUF file or a folder with config.json")
        return str(_converted(path, say))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder {name} has no config.json: it holds no model that transformers can load")
        return str(path)
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf")
    if looks_like_hub:
        return name
    known = ", ".join(catalogue.CATALOGUE)
    raise UnknownNameError(
        f"unknown model {name!r}: give a short name ({known}), a GGUF file, a folder, or a hub name owner/model"
    )


def _converted(file: Path, say: Say) -> Path:
    """Return the folder with the converted model of a GGUF file, converting it first if need be."""
    target = settings.cache_folder() / "converted" / _file_hash(file)[:32]
    if (target / "config.json").is_file():
        return target
    say(f"converting {file.name} (once)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent))
    except OSError as error:
        raise ModelError(f"can't write to {target.parent}: {error.strerror} (set LONGSPAN_CACHE)") from error
    try:
        with _quiet():
            from transformers import AutoModelForCausalLM, AutoTokenizer

            # float32 holds every GGUF format's values exactly.
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            # The weights are plain numbers from here on.
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.hf_quantizer = None
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        try:
            folder.replace(target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was faster
                raise
    except OSError as error:
        raise ModelError(f"can't convert {file} into {target.parent}: {_first_line(error)}") from error
    except Exception as error:
        raise ModelError(f"{file} can't be read as GGUF: {_first_line(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    """Return what an error says first: one line, or all of them where the first only announces the others."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines) if lines[0].endswith(":") else lines[0]


@contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Keep transformers' bars, warnings and logging off the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import transformers

    bars: Any = transformers.utils.logging
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]  # the hub's tells each retry
    levels = [logger.level for logger in loggers]
    loggers[1].setLevel(logging.ERROR)
    bars.disable_progress_bar()
    bars.set_verbosity_error()
    told = io.StringIO()
    try:
        with redirect_stderr(told):
            yield told
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
