"""Passages about nothing that exists, without end: documents that stand in the way of the one that is asked for.

They have the manner of `passages.json`: towns, people, things, numbers. Their names are put together from syllables, so
that they are those of no passage that is asked about.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

_FIRST = "Al Bel Cor Dar El Fen Gal Hal Ir Jor Kel Lor Mar Nel Or Pel Quin Ros Sel Tor Ul Ver Wil Yor Zel".split()
_MIDDLE = "a e i o u an ar en er il im on or us".split()
_PERSON = "bert da dan dra fried la len lin mir na nor ric ta tin va win".split()
_PLACE = "bridge burn bury by combe dale den fell field ford gate ham hurst mouth stead wick".split()
_FAMILY = "ash beck crane drell fane gant holt kemp lund moor nash peake rusk stroud thorn venn".split()

_MAKERS = "baker bookbinder chemist clockmaker cooper farrier gardener locksmith mason potter surveyor weaver".split()
_THINGS = "barometer bell calendar carpet chair compass fountain globe harmonium kiln printing-press sundial".split()
_STUFFS = "amber ash-wood brass copper felt granite horn iron linen marble oak pewter sandstone slate wax".split()
_ANIMALS = "badgers cranes geese goats hares herons horses larks mules otters pigeons ravens storks swifts".split()
_CROPS = "apples beans beets cabbages cherries hops lentils onions pears plums poppies quinces radishes walnuts".split()
_SEASONS = "spring summer autumn winter".split()

_FORMS = (
    "{place} is a town of {n} people on the {river}. It lives by its {crop}, which are sold at a fair in {season}, "
    "and is known for a {thing} of {stuff} that stands before the town hall. The {thing} was given by {person} in "
    "{year}, in thanks for a night's shelter. The school of the town keeps {animal} and teaches their care.",
    "{person} was a {maker} of {place} who worked in {stuff} for {few} years. The best of what is left is a {thing} "
    "that was made for a wedding in {year} and never paid for. A bill of {n} crowns for it still hangs in the "
    "workshop, where {family} cousins sell {crop} today. Visitors come mostly in {season}.",
    "The {place} {thing} is made of {stuff} and weighs {n} pounds. It was begun in {year} by {person}, who gave it up "
    "after a quarrel about {animal}, and finished by a {maker} of the same town. It has been stolen {few} times and "
    "found each time in a field of {crop}. It is shown in {season} only.",
    "The {river} rises near {place} and is {few} miles longer than it was in {year}, when a flood made it leave its "
    "bed. Its banks are planted with {crop}, and {animal} winter there in numbers of up to {n}. The first bridge over "
    "it was of {stuff} and was built by {person}, a {maker}, without being asked.",
    "The society of friends of {animal} was founded in {place} in {year}. Its {n} members meet each {season} in the "
    "house of {person} and vote by placing {crop} in a bowl of {stuff}. The society has published {few} books, all of "
    "them about the same winter, and owns a {thing} that no one is allowed to touch.",
    "In {year} the {maker} {person} walked from {place} to the sea with {few} companions and a {thing} of {stuff}. "
    "The journey took all {season}, since at every village they stopped to count {animal}. Their count, {n}, was "
    "doubted at once. The road that they took is lined with {crop} and bears the name {family} Way.",
    "The {family} collection in {place} holds {n} pieces of {stuff}, among them a {thing} with {few} faces. It was "
    "brought together by {person}, who had been a {maker} until {year} and could not pass a market without buying. "
    "The house is guarded by {animal}. Tickets are paid in {crop}, a custom kept up every {season}.",
    "A {thing} made of {stuff} is carried through {place} each {season} to bring luck to the {crop}. The custom goes "
    "back to {person}, a {maker} who won a bet about {animal} in {year} and had nothing else to pay the bearers with. "
    "It needs {few} of them. In a dry year {n} people came to see it and it rained.",
)


def passages(rng: random.Random) -> Iterator[str]:
    """Yield passages of about fifty words."""
    while True:
        family = _name(rng, _FAMILY)
        yield rng.choice(_FORMS).format(
            place=_name(rng, _PLACE),
            river=f"river {_name(rng, _PERSON)}",
            person=f"{_name(rng, _PERSON)} {family}",
            family=family,
            maker=rng.choice(_MAKERS),
            thing=rng.choice(_THINGS),
            stuff=rng.choice(_STUFFS),
            animal=rng.choice(_ANIMALS),
            crop=rng.choice(_CROPS),
            season=rng.choice(_SEASONS),
            year=rng.randint(1400, 1990),
            n=f"{rng.randint(1000, 99999):,}",
            few=rng.randint(11, 99),
        )


def _name(rng: random.Random, endings: list[str]) -> str:
    return rng.choice(_FIRST) + rng.choice(_MIDDLE) + rng.choice(endings)
