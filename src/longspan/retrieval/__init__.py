"""Choosing what to read: documents, a lexical index, and the model's own retrieval heads."""
