"""Durable contexts: what a session holds, and how it is kept on disk."""
