"""Questions that share no content word with the sentence that answers them: knowledge of the world must join the two.

Modarressi et al., "NoLiMa: Long-Context Evaluation Beyond Literal Matching" (arXiv 2502.05167). As there: one needle, a
person in prose, at any depth; the question names what follows from the needle by one association (`onehop`: a
landmark and its city) or two (`twohop`: the city's country or region); the score is whether the answer holds the
person's name. `literal` asks in the needle's own words: what a model loses between it and the others is the
association's, not the length's.

Here: needles, questions and names are written for this project (`_PAIRS`, 24 of them), names are such as the haystack
does not hold, a person is what the paper calls a character (our prose speaks of characters of text), and an answer may
take 24 tokens. Chance: one of the names that may be asked for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from longspan.errors import UsageError
from longspan.evals.questions.example import Draft, Eval, Setting, in_turn
from longspan.evals.questions.hiding import in_prose

_NAMES = (
    """
    Ambrose Brigitta Cosimo Delphine Eamon Fenella Gustavo Henrike Ilario Jocasta Kasimir Lucinda
    Mafalda Noemi Ottilie Percival Rosalba Sigurd Theodora Ulrika Valeria Wilhelmina Xaver Yolanda
    """
).split()

# (needle, what a question in its own words says, in one step of association, in two). {n}: the person.
_PAIRS = (
    ("{n} rents a room with a window that looks out on the Sagrada Familia.",
     "rents a room that looks out on the Sagrada Familia", "has been to Barcelona", "has been to Catalonia"),
    ("{n} sells postcards at the foot of the Eiffel Tower.",
     "sells postcards at the Eiffel Tower", "has been to Paris", "has been to France"),
    ("{n} sweeps the steps of the Bolshoi Theatre every dawn.",
     "sweeps the steps of the Bolshoi Theatre", "has been to Moscow", "has been to Russia"),
    ("{n} feeds pigeons beside the Trevi Fountain.",
     "feeds pigeons beside the Trevi Fountain", "has been to Rome", "has been to Italy"),
    ("{n} guards the gates of the Alhambra at night.",
     "guards the gates of the Alhambra", "has been to Granada", "has been to Andalusia"),
    ("{n} repairs the clocks of the Hofburg.",
     "repairs the clocks of the Hofburg", "has been to Vienna", "has been to Austria"),
    ("{n} goes for a run around the Brandenburg Gate each morning.",
     "goes for a run around the Brandenburg Gate", "has been to Berlin", "has been to Germany"),
    ("{n} paints portraits on the Charles Bridge.",
     "paints portraits on the Charles Bridge", "has been to Prague", "has been to Bohemia"),
    ("{n} teaches swimming within sight of Bondi Beach.",
     "teaches swimming near Bondi Beach", "has been to Sydney", "has been to Australia"),
    ("{n} tunes the pianos of Carnegie Hall.",
     "tunes the pianos of Carnegie Hall", "has been to New York", "has been to the United States"),
    ("{n} keeps bees on a roof opposite the Parthenon.",
     "keeps bees opposite the Parthenon", "has been to Athens", "has been to Greece"),
    ("{n} cooks lunch for the staff of the Topkapi Palace.",
     "cooks lunch at the Topkapi Palace", "has been to Istanbul", "has been to Turkey"),
    ("{n} folds maps in a kiosk near the temple of Senso-ji.",
     "folds maps near the temple of Senso-ji", "has been to Tokyo", "has been to Japan"),
    ("{n} drives a taxi past the Taj Mahal each evening.",
     "drives a taxi past the Taj Mahal", "has been to Agra", "has been to India"),
    ("{n} mends shoes below the statue of Christ the Redeemer.",
     "mends shoes below Christ the Redeemer", "has been to Rio de Janeiro", "has been to Brazil"),
    ("{n} writes letters on a bench facing the Little Mermaid.",
     "writes letters facing the Little Mermaid", "has been to Copenhagen", "has been to Denmark"),
    ("{n} has an office across from the Rijksmuseum.",
     "has an office across from the Rijksmuseum", "has been to Amsterdam", "has been to the Netherlands"),
    ("{n} gets a stomach ache from a single glass of milk.",
     "gets a stomach ache from milk", "is lactose intolerant", "should keep away from ice cream"),
    ("{n} has eaten neither meat nor fish since childhood.",
     "has eaten neither meat nor fish", "is a vegetarian", "would refuse a steak"),
    ("{n} never leaves home without an insulin pen.",
     "never leaves home without an insulin pen", "has diabetes", "must be careful with sweets"),
    ("{n} crosses the road with a white cane.",
     "crosses the road with a white cane", "is blind", "reads Braille"),
    ("{n} spends the week drilling and filling molars.",
     "spends the week drilling molars", "is a dentist", "can help against toothache"),
    ("{n} slides down the pole whenever the siren goes.",
     "slides down the pole when the siren goes", "is a firefighter", "puts out blazes for a living"),
    ("{n} sheared forty ewes before supper.",
     "sheared forty ewes", "is a shepherd", "could supply wool"),
)  # fmt: skip
_HOPS = ("literal", "onehop", "twohop")


@dataclass(frozen=True)
class NoLima:
    """A person who is asked for by association."""

    hops: int
    """Associations between needle and question; 0: the question has the needle's words."""
    depth: float | None = None
    """Where the needle stands, from 0 to 1; None: drawn."""
    max_tokens: int = 24
    scoring: str = "all"

    def draw(self, rng: random.Random, setting: Setting) -> Draft:
        """See `Family`."""
        source = setting.sources.words
        names = _names(setting)
        forms = in_turn(_PAIRS, setting)
        name = rng.choice(names)
        depth = rng.random() if self.depth is None else self.depth
        needle = forms[0].format(n=name)
        head = "Read the text below. I will ask about a person in it later.\n"
        hay = in_prose(source, rng.randrange(len(source)), [needle], [depth])
        return Draft(
            context=lambda count: f"{head}{hay(count)}\n",
            question=f"Which person in the text above {forms[1 + self.hops]}? Answer with the name alone.",
            answer_prefix="The name of that person is",
            outputs=(name,),
            least=1,
            needles=(needle,),
            head=head,
            chance=1 / len(names),
            guess=lambda own: own.choice(names),
        )


def _names(setting: Setting) -> list[str]:
    """Return the names that the haystack does not hold (UsageError: it holds nearly all)."""
    held = setting.sources.vocabulary
    names = [name for name in _NAMES if name.casefold() not in held]
    if len(names) < len(_NAMES) // 2:
        raise UsageError("the text for haystacks holds most names of the people who are asked for: give another one")
    return names


NOLIMA = Eval(
    "nolima",
    "questions that share no content word with the sentence that answers them",
    "arXiv 2502.05167",
    version=1,
    tasks={name: NoLima(hops) for hops, name in enumerate(_HOPS)},
    paired=True,
    ordered=frozenset(_HOPS),
)
