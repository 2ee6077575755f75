"""The server: OpenAI's endpoints, sessions, metrics and a page, over one scheduler.

    app = create_app(Scheduler(llm), ServerOptions())

It does not know how answers are made: every request becomes a `Request` of `engine.serving`, whose thread owns the
model, and nothing here waits for that thread but whoever asked.
"""
