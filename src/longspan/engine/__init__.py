"""The engine: a model, contexts it has read, questions and answers."""
