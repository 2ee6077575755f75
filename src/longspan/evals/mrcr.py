"""MRCR: a conversation in which the same thing was asked several times; repeat the answer that was given the k-th time.

Vodrahalli et al., "Michelangelo" (arXiv 2409.12640, section 3.2), as OpenAI MRCR made it public: among asks for writing
of some form about some topic, 2, 4 or 8 are identical; the model must repeat the k-th answer, beginning with ten random
letters and digits, and the score is the ratio of difflib's SequenceMatcher, 0 where it does not begin so. Distractors
share the form or the topic with what is asked.

Here: answers are put together from sentences of our own with words of `words.txt`, about sixty words each, instead of
being written by a model; the conversation is told as text in the user's turn; an answer may take as many tokens as the
right one and 16 more. What chance gives is the score of one who repeats any of the identical asks' answers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from string import ascii_letters, digits

from longspan.evals.questions import words
from longspan.evals.questions.example import Draft, Eval, Setting
from longspan.evals.questions.fill import Drawn
from longspan.evals.questions.hiding import among_lines

_FORMS = "poem letter speech riddle toast review diary-entry news-item love-song bedtime-story".split()
_TOPICS = 40
"""Topics of one conversation: few enough that distractors come close."""
_SENTENCES = (
    "Nobody had told the {noun} that a {topic} could {verb} before breakfast.",
    "O {adjective} {topic}, you {verb} like a {noun} in the rain.",
    "Once a {topic} and a {noun} agreed to {verb} until the {noun2} grew {adjective}.",
    "I kept one {topic} under the {noun}, where it could {verb} in peace.",
    "They say that every {adjective} {noun} dreams of a {topic}.",
    "In the end it was the {noun} who taught the {topic} to {verb}.",
    "What is more {adjective} than a {topic} beside a broken {noun}?",
    "We {verb}, we laugh, and the {topic} watches from its {noun}.",
    "My grandmother traded her {noun} for a {adjective} {topic} and never looked back.",
    "Give me a {noun}, a {noun2} and a {topic}, and I will {verb} all winter.",
    "The {topic} did not {verb}; it only turned {adjective} and left the {noun} alone.",
    "Some nights a {adjective} {noun} sings the name of the {topic}.",
    "Let the {noun} rest, for the {topic} has learned to {verb} without it.",
    "There is a {noun} in this town that smells of {topic} and of {noun2}.",
    "Ask the {adjective} {noun2} why no {topic} would ever {verb} here.",
    "It began with a {topic}, a {adjective} {noun}, and a promise to {verb}.",
)
_EACH = 5
"""Sentences of an answer."""
_ARTICLES = re.compile(r"\b([Aa]) (?=[aeiou])")
_ORDINALS = "first second third fourth fifth sixth seventh eighth".split()


@dataclass(frozen=True)
class Mrcr:
    """Identical asks in a conversation."""

    asks: int = 2
    """Identical asks."""
    max_tokens: int = 128
    scoring: str = "sequence"

    def draw(self, rng: random.Random, setting: Setting) -> Draft:
        """See `Family`."""
        topics = rng.sample(words.sections()["nouns"], _TOPICS)
        form, topic = rng.choice(_FORMS), topics[0]
        own = [_written(rng, topic) for _ in range(self.asks)]
        depths = sorted(rng.random() for _ in own)
        asked = rng.randrange(self.asks)
        mark = "".join(rng.choices(ascii_letters + digits, k=10))
        others = Drawn(_others(random.Random(rng.getrandbits(64)), form, topics))
        turns = [_turn(form, topic, text) for text in own]
        head = "Below is a conversation between a user and an assistant.\n\n"
        alike = sum(SequenceMatcher(None, text, own[asked]).ratio() for text in own)
        return Draft(
            context=lambda count: head + "\n\n".join(among_lines(others.first(count), turns, depths)) + "\n\n",
            question=f"Write {mark}, and after it, word for word, what the assistant wrote when it was asked for a "
            f"{form} about {topic} for the {_ORDINALS[asked]} time. Write nothing else.",
            answer_prefix="",
            outputs=(mark, own[asked]),
            least=1,
            needles=tuple(turns),
            head=head,
            max_tokens=len(setting.tokens_of(f"{mark} {own[asked]}")) + 16,
            chance=alike / len(own),
            guess=lambda guessing: f"{mark} {guessing.choice(own)}",
        )


def _turn(form: str, topic: str, text: str) -> str:
    return f"User: Write a {form} about {topic}.\nAssistant: {text}"


def _others(rng: random.Random, form: str, topics: list[str]) -> Iterator[str]:
    """Yield asks and answers that are not the one asked for; each second one shares its form or its topic."""
    while True:
        kind = rng.random()
        other_form = form if kind < 0.25 else rng.choice(_FORMS)
        other_topic = topics[0] if 0.25 <= kind < 0.5 else rng.choice(topics)
        if (other_form, other_topic) != (form, topics[0]):
            yield _turn(other_form, other_topic, _written(rng, other_topic))


def _written(rng: random.Random, topic: str) -> str:
    """Return an answer about a topic."""
    kinds = words.sections()

    def told(sentence: str) -> str:
        noun, other = rng.sample(kinds["nouns"], 2)
        return sentence.format(
            topic=topic,
            noun=noun,
            noun2=other,
            adjective=rng.choice(kinds["adjectives"]),
            verb=rng.choice(kinds["verbs"]),
        )

    text = " ".join(told(sentence) for sentence in rng.sample(_SENTENCES, _EACH))
    return _ARTICLES.sub(r"\1n ", text)


MRCR = Eval(
    "mrcr",
    "which of several answers to the same ask",
    "arXiv 2409.12640; OpenAI MRCR",
    version=1,
    tasks={f"mrcr_{asks}": Mrcr(asks) for asks in (2, 4, 8)},
)
