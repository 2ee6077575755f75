"""Documents that come with a request: as text, as uploaded files, or by a path below one folder of the server.

No path from a request reaches the file system but below that folder, links followed. It does not know sessions.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

from longspan.errors import DocumentError
from longspan.retrieval.documents import read_documents, text_of
from longspan.server.refusals import ApiError
from longspan.server.session_fields import DocumentPath, DocumentText, Given

_UNPACKED = 8
"""How many times the most that may be uploaded an archive (a DOCX is one) may say it unpacks to."""


def texts(given: Sequence[Given], folder: Path | None) -> list[tuple[str, str]]:
    """Return names and texts of documents (ApiError: a path that is not served; DocumentError: it can't be read)."""
    found: list[tuple[str, str]] = []
    for each in given:
        if isinstance(each, DocumentText):
            found.append((each.name, each.text))
        else:
            found += _below(each, folder)
    return found


def _below(given: DocumentPath, folder: Path | None) -> list[tuple[str, str]]:
    if folder is None:
        raise ApiError(
            403, "this server reads no documents by path: upload them, or start it with --documents FOLDER",
            param="documents", code="paths_not_served",
        )  # fmt: skip
    missing = ApiError(404, f"there is no document {given.path!r} in the server's folder", param="documents",
                       code="document_not_found")  # fmt: skip
    try:
        root = folder.resolve(strict=True)
        path = (root / given.path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # none, a zero byte, or links in a circle
        raise missing from None
    # Resolved first: neither .. nor a link leads out. What lies outside is not told apart from what is not there.
    if not path.is_relative_to(root) or not path.is_file():
        raise missing
    try:
        return [(given.path, document.text) for document in read_documents([path]).documents]
    except DocumentError as error:
        # The message names the file by where it lies on the server.
        raise ApiError(400, str(error).replace(str(path), given.path), param="documents") from error


def uploaded(name: str, content: bytes, most: int) -> tuple[str, str]:
    """Return name and text of an uploaded file (ApiError: it would unpack to too much; DocumentError: no text)."""
    shown = Path(name.replace("\\", "/")).name[:200] or "upload"
    if content.startswith(b"PK\x03\x04"):
        try:
            unpacked = sum(each.file_size for each in zipfile.ZipFile(io.BytesIO(content)).infolist())
        except Exception:  # told as a damaged document below
            unpacked = 0
        if unpacked > _UNPACKED * most:
            raise ApiError(413, f"{shown} would unpack to {unpacked:,} bytes: give its text", param="files",
                           code="document_too_large")  # fmt: skip
    return shown, text_of(content, shown)
