"""A whole model at long contexts: time to the first token, prefill, decode, memory; logits are checked first.

`checks` compares with transformers, `measure` times one context, `run` goes through what is asked for.
"""
