"""Evals of models that run elsewhere: any endpoint that speaks the OpenAI protocol is an asker.

`client` sends requests and tries again, `stream` reads answers as they come, `asker` puts questions.
"""
