"""Many requests at once on one model: a scheduler, what it is asked, and what it tells.

scheduler = Scheduler(llm)
scheduler.start()
for event in scheduler.submit(Request(text="The ferry to Oslo")): print(event)
scheduler.close()
"""

from longspan.engine.serving.events import Delta, Done, Event, Progress, PromptRead, TokenLogprob, Usage
from longspan.engine.serving.handle import Handle
from longspan.engine.serving.metrics import Metrics
from longspan.engine.serving.requests import Constraint, Limits, Request
from longspan.engine.serving.scheduler import Scheduler

__all__ = [
    "Constraint",
    "Delta",
    "Done",
    "Event",
    "Handle",
    "Limits",
    "Metrics",
    "Progress",
    "PromptRead",
    "Request",
    "Scheduler",
    "TokenLogprob",
    "Usage",
]
