"""The one tree of exceptions.

`LongspanError` is what a program catches; every message is one line that names the fix, because the command line
prints it as it is. Errors that a caller made are also `ValueError` (or `FileNotFoundError`), so that code which knows
nothing of Longspan still catches them. What Longspan itself got wrong stays an `AssertionError`.
"""

from __future__ import annotations


class LongspanError(Exception):
    """Anything that Longspan refuses or fails to do, told in one line."""


class UsageError(LongspanError, ValueError):
    """A value that can't be used: an unknown name or option, a number out of range."""


class UnknownNameError(UsageError):
    """A name that is in no catalogue or registry; the message lists the names that are."""


class DocumentError(LongspanError, ValueError):
    """A document that can't be read: missing, empty, binary, or of a kind that nothing here extracts."""


class ModelError(LongspanError, ValueError):
    """A model that can't be found, fetched, loaded or run by Longspan."""


class ContextTooLongError(LongspanError, ValueError):
    """Tokens that must be read in one window are more than the window holds."""


class PoolExhaustedError(LongspanError):
    """Pages need more bytes than a budget has left; the message names the budget. Nothing was changed."""


class SessionError(LongspanError):
    """A saved session that can't be used."""


class SessionNotFoundError(SessionError, FileNotFoundError):
    """No session of that name is saved; the message lists those that are."""

    def __str__(self) -> str:
        """Return the message alone (`FileNotFoundError` would add an errno)."""
        return str(self.args[0]) if self.args else ""


class SessionCorruptError(SessionError):
    """A file of a saved session is missing, cut short, or fails its checksum."""


class SessionMismatchError(SessionError, ValueError):
    """The saved session was made with another model, tokenizer, attention, prefill, number type or KV format."""


class SaveError(SessionError, OSError):
    """Saving failed (a full disk, say); what was saved before is untouched."""

    def __str__(self) -> str:
        """Return the message alone (`OSError` would add an errno)."""
        return str(self.args[0]) if self.args else ""


class EndpointError(LongspanError):
    """An endpoint that can't be reached, refuses what is asked of it, or keeps failing."""


class ParallelError(LongspanError):
    """Ranks that can't go on together: one of them stopped, or did not answer in time."""


class BusyError(LongspanError):
    """More requests wait than are taken on: ask again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        """Take the message, and in how many seconds there may be room."""
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(LongspanError):
    """Something in the engine itself failed while a request was worked on; others are not concerned."""


class Cancelled(LongspanError):
    """The user stopped the work (Ctrl-C); what had been read so far is kept in the session."""
