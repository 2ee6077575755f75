"""Models from transformers: the one room that touches transformers' internals."""
