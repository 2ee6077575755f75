"""Reads single fields of a config.json: numbers that must be there, are there under another name, or may be left out.

An error names the field. It does not know what fields mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.errors import ModelError

_TEXT = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where models that also see or hear have the configuration of their language model."""
_ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_hidden_size", "ffn_dim"),
    "max_position_embeddings": ("n_positions", "max_sequence_length", "max_seq_len", "model_max_length"),
}
_MOST = 1 << 40


class Fields:
    """The fields of one configuration."""

    def __init__(self, name: str, given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        """Take a configuration; of a model with several parts, its language model's.

        Args:
            name: of the model, for errors.
            given: what its config.json holds.
            defaults: what it may leave out.
        """
        self.name, self.nested = name, False
        for part in _TEXT:
            if isinstance(inner := given.get(part), dict):
                given, self.nested = {**{k: v for k, v in given.items() if k == "tie_word_embeddings"}, **inner}, True
                break
        self._given = {**(defaults or {}), **{key: value for key, value in given.items() if value is not None}}

    @property
    def kind(self) -> str:
        """`model_type`, or what stands for none."""
        return str(self._given.get("model_type", "")).lower()

    def with_defaults(self, defaults: Mapping[str, Any]) -> Fields:
        """Return the same with fields that it may leave out."""
        return Fields(self.name, self._given, defaults)

    def get(self, field: str, default: Any = None) -> Any:
        """Return a field as it is, also where it has another name."""
        for each in (field, *_ALIASES.get(field, ())):
            if each in self._given:
                return self._given[each]
        return default

    def whole(self, field: str, default: int | None = None) -> int:
        """Return a whole number of at least 1.

        Raises:
            ModelError: it is not there and has no default, or is no such number.
        """
        value = self.get(field, default)
        if value is None:
            others = " or ".join(_ALIASES.get(field, ()))
            raise ModelError(
                f"the config.json of {self.name} has no field {field!r}{f' ({others})' if others else ''}: "
                "without it nothing can be planned"
            )
        # A few configurations hold a number for every layer: those that do are read by `each`.
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
            raise ModelError(
                f"the field {field!r} of {self.name}'s config.json is {str(value)[:40]!r}: it must be a whole number "
                f"from 1 to {_MOST:,}"
            )
        return value

    def count(self, field: str, default: int = 0) -> int:
        """Return a whole number that may be 0 or missing (ModelError: it is something else)."""
        value = self.get(field, default)
        return 0 if value in (0, None) and not isinstance(value, bool) else self.whole(field)

    def factor(self, field: str) -> float:
        """Return a number by which something is multiplied, 1 where it is missing (ModelError: it is no number)."""
        value = self.get(field, 1.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _MOST:
            raise ModelError(f"the field {field!r} of {self.name}'s config.json is {value!r}: it must be a number")
        return float(value)

    def each(self, field: str, layers: int) -> list[Any] | None:
        """Return a list with an entry a layer; None: there is none (ModelError: it has another length)."""
        value = self.get(field)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers:
            raise ModelError(f"the field {field!r} of {self.name}'s config.json must be a list of {layers} entries")
        return value

    def yes(self, field: str, default: bool = False) -> bool:
        """Return whether something is so."""
        return bool(self.get(field, default))
