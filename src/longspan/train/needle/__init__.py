"""The `needle` model: a small hybrid that reads a haystack of real text and answers questions about facts in it."""
