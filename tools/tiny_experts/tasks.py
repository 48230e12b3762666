"""The synthetic domains: prompts with answers that can be checked. Pure functions of a random generator."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its only right answer."""

    prompt: str
    answer: str


def largest(random: Random) -> Example:
    """Largest of four two-digit numbers; answers of 2 tokens."""
    numbers = random.sample(range(10, 100), 4)
    return Example("largest " + " ".join(map(str, numbers)), str(max(numbers)))


def sort(random: Random) -> Example:
    """Five letters into alphabetical order; answers of 5 tokens."""
    letters = random.sample(string.ascii_lowercase, 5)
    return Example("sort " + " ".join(letters), " ".join(sorted(letters)))


NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo")
CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Delhi", "Kyoto", "Paris", "Quito", "Seoul", "Tunis")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def tool(random: Random) -> Example:
    """A request into a JSON tool call; answers of about 23 tokens."""
    name, city, day = random.choice(NAMES), random.choice(CITIES), random.choice(DAYS)
    number = random.randrange(2, 10)
    kind = random.randrange(3)
    if kind == 0:
        prompt = f"table for {number} in {city} on {day}, {name}"
        call = {"tool": "book", "city": city, "day": day, "guests": number, "name": name}
    elif kind == 1:
        prompt = f"wake {name} on {day}, room {number}, {city}"
        call = {"tool": "alarm", "name": name, "room": number, "day": day, "city": city}
    else:
        prompt = f"{name} rides bus {number} to {city} on {day}"
        call = {"tool": "ride", "bus": number, "to": city, "day": day, "name": name}
    return Example(prompt, json.dumps(call))


DOMAINS: Mapping[str, Callable[[Random], Example]] = {"largest": largest, "sort": sort, "tool": tool}


def splits(domain: str, sizes: Mapping[str, int], seed: int) -> dict[str, list[Example]]:
    """Disjoint lists of examples of one domain, `sizes` names and sizes them; no prompt occurs twice.

    Later splits depend on the sizes of earlier ones, so name the evaluation first to keep it when
    the others change.
    """
    random = Random(f"{seed}/{domain}")
    seen: set[str] = set()
    result: dict[str, list[Example]] = {}
    for split, size in sizes.items():
        rows = result[split] = []
        while len(rows) < size:
            example = DOMAINS[domain](random)
            if example.prompt not in seen:
                seen.add(example.prompt)
                rows.append(example)
    return result
