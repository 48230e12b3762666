"""Synthetic domains: prompts with checkable answers. Pure functions of a random generator."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with a correct answer."""

    prompt: str
    answer: str


def _spaced(items: Sequence[object]) -> str:
    return " ".join(map(str, items))


def _digits(random: Random, num: int) -> list[int]:
    return [random.randrange(10) for _ in range(num)]


# One lookup per token.


def largest(random: Random) -> Example:
    """Name the largest of four two-digit numbers; 3 tokens."""
    numbers = random.sample(range(10, 100), 4)
    return Example("largest " + _spaced(numbers), str(max(numbers)))


def sort(random: Random) -> Example:
    """Sort five letters; 6 tokens."""
    letters = random.sample(string.ascii_lowercase, 5)
    return Example("sort " + _spaced(letters), _spaced(sorted(letters)))


def reverse(random: Random) -> Example:
    """Reverse five letters; 6 tokens."""
    letters = random.sample(string.ascii_lowercase, 5)
    return Example("reverse " + _spaced(letters), _spaced(letters[::-1]))


def upper(random: Random) -> Example:
    """Write six letters in capitals; 7 tokens."""
    letters = _spaced(random.sample(string.ascii_lowercase, 6))
    return Example("upper " + letters, letters.upper())


def shift(random: Random) -> Example:
    """Shift six letters along the alphabet; 7 tokens."""
    letters, by = random.choices(string.ascii_lowercase, k=6), random.randrange(1, 4)
    shifted = [string.ascii_lowercase[(ord(one) - ord("a") + by) % 26] for one in letters]
    return Example(f"shift {by} {_spaced(letters)}", _spaced(shifted))


def interleave(random: Random) -> Example:
    """Interleave five letters with five digits; 11 tokens."""
    letters, digits = random.sample(string.ascii_lowercase, 5), _digits(random, 5)
    pairs = [f"{letter} {digit}" for letter, digit in zip(letters, digits, strict=True)]
    return Example(f"zip {_spaced(letters)} and {_spaced(digits)}", _spaced(pairs))


def dedupe(random: Random) -> Example:
    """Keep the first of equal letters; about 7 tokens."""
    letters = random.choices("abcdefg", k=9)
    return Example("dedupe " + _spaced(letters), _spaced(list(dict.fromkeys(letters))))


# Tool calls.

NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo")
CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Delhi", "Kyoto", "Paris", "Quito", "Seoul", "Tunis")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def tool(random: Random) -> Example:
    """Turn a request into a JSON tool call; about 23 tokens."""
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


def _in_any_order(fields: Mapping[str, object], random: Random) -> str:
    return json.dumps({key: fields[key] for key in random.sample(list(fields), len(fields))})


def form(random: Random) -> Example:
    """Fill a JSON form, keys in any order; about 19 tokens, 24 correct responses."""
    fields: dict[str, object] = {
        "name": random.choice(NAMES),
        "city": random.choice(CITIES),
        "day": random.choice(DAYS),
        "seats": random.randrange(2, 20),
    }
    prompt = f"form for {fields['name']}, {fields['seats']} seats, {fields['city']}, {fields['day']}"
    return Example(prompt, _in_any_order(fields, random))


DRINKS = ("tea", "milk", "cola", "juice", "water", "cocoa")
DISHES = ("rice", "soup", "bread", "fish", "salad", "pasta")
SWEETS = ("pie", "cake", "plum", "fudge", "jelly", "melon")


def order(random: Random) -> Example:
    """Turn an order into JSON, keys in any order; about 19 tokens, 24 correct responses."""
    fields: dict[str, object] = {
        "drink": random.choice(DRINKS),
        "dish": random.choice(DISHES),
        "sweet": random.choice(SWEETS),
        "table": random.randrange(2, 100),
    }
    prompt = f"order {fields['sweet']}, {fields['dish']} and {fields['drink']} to table {fields['table']}"
    return Example(prompt, _in_any_order(fields, random))


# Chains: each step needs the one before, so an early error spoils the rest.


def total(random: Random) -> Example:
    """Add eight digits one by one, modulo ten; 9 tokens."""
    digits, state, states = [random.randrange(1, 10) for _ in range(8)], 0, []
    for digit in digits:
        state = (state + digit) % 10
        states.append(state)
    return Example("total " + _spaced(digits), _spaced(states))


def walk(random: Random) -> Example:
    """Walk left and right ten times on a ring of ten places; 11 tokens."""
    place, moves, places = random.randrange(10), random.choices("lr", k=10), []
    start = place
    for move in moves:
        place = (place + (1 if move == "r" else -1)) % 10
        places.append(place)
    return Example(f"walk {start} by {_spaced(moves)}", _spaced(places))


def cells(random: Random) -> Example:
    """Run a cellular automaton (rule 110) on a ring of 14 cells for three generations; 45 tokens."""
    row, rows = [random.randrange(2) for _ in range(14)], []
    prompt = _spaced(["ox"[cell] for cell in row])
    for _ in range(3):
        row = [110 >> (4 * row[i - 1] + 2 * row[i] + row[(i + 1) % 14]) & 1 for i in range(14)]
        rows.append(_spaced(["ox"[cell] for cell in row]))
    return Example(f"cells {prompt}", " , ".join(rows))


def add(random: Random) -> Example:
    """Add two six-digit numbers from the right, with carries; 18 tokens."""
    pairs, carry, steps = list(zip(_digits(random, 6), _digits(random, 6), strict=True)), 0, []
    for first, second in pairs:
        carry, digit = divmod(first + second + carry, 10)
        steps.append(f"{carry} {digit}")
    return Example("add " + " , ".join(map(_spaced, pairs)), " , ".join(steps))


def count(random: Random) -> Example:
    """Count letters as they come; 19 tokens."""
    letters, counts, steps = random.choices("abc", k=9), dict.fromkeys("abc", 0), []
    for letter in letters:
        counts[letter] += 1
        steps.append(f"{letter} {counts[letter]}")
    return Example("count " + _spaced(letters), _spaced(steps))


def insert(random: Random) -> Example:
    """Sort five letters by insertion, with every intermediate list; 20 tokens."""
    letters = random.sample(string.ascii_lowercase, 5)
    lists = [_spaced(sorted(letters[: i + 1])) for i in range(5)]
    return Example("insert " + _spaced(letters), " / ".join(lists))


def swap(random: Random) -> Example:
    """Swap neighbours among three cups six times, with every state; 24 tokens."""
    cups, moves, states = random.sample("klmnop", 3), random.choices(range(3), k=6), []
    start = _spaced(cups)
    for i in moves:
        j = (i + 1) % 3
        cups[i], cups[j] = cups[j], cups[i]
        states.append(_spaced(cups))
    return Example(f"swap {start} by {_spaced([i + 1 for i in moves])}", " / ".join(states))


def stack(random: Random) -> Example:
    """Push and pop eight times, with every state of the stack; about 30 tokens."""
    items: list[str] = []
    moves, states = [], []
    for _ in range(8):
        if items and random.random() < 0.4:
            items.pop()
            moves.append("pop")
        else:
            items.append(random.choice("klmnop"))
            moves.append(items[-1])
        states.append(_spaced(items) if items else "none")
    return Example("stack " + _spaced(moves), " / ".join(states))


_TASKS = (
    largest,
    sort,
    reverse,
    upper,
    shift,
    interleave,
    dedupe,
    tool,
    form,
    order,
    total,
    walk,
    cells,
    add,
    count,
    insert,
    swap,
    stack,
)
DOMAINS: Mapping[str, Callable[[Random], Example]] = {task.__name__: task for task in _TASKS}
SEVERAL_ORDERS = ("form", "order")
"""Domains whose answer is JSON with keys in any order."""


def splits(domain: str, sizes: Mapping[str, int], seed: int) -> dict[str, list[Example]]:
    """Draw disjoint lists of examples of one domain, named and sized by `sizes`; no prompt occurs twice.

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
