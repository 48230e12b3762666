"""Five domains whose responses a verifier grades; in two of them the model calls a tool first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from mergeopd.environment.calculator import calculate


@dataclass(frozen=True, slots=True)
class AgentExample:
    """A prompt with a correct response. `columns` are the other columns of its row, as its verifier needs.

    With `arguments`, the first turn calls the domain's tool, and the response follows its reply. The base
    learns easy examples only, so that it is sometimes right.
    """

    prompt: str
    response: str
    is_easy: bool
    columns: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, str] | None = None
    document: str | None = None
    """what the search has to find"""


def math(random: Random) -> AgentExample:
    """Add and subtract four numbers one by one, below twenty; the last sum is in a box."""
    total = random.randrange(1, 10)
    prompt, sums = str(total), []
    for _ in range(3):
        number = random.randrange(1, 10)
        sign = random.choice("-+") if number <= total < 20 - number else "-" if number <= total else "+"
        total += number if sign == "+" else -number
        prompt += f" {sign} {number}"
        sums.append(str(total))
    is_easy = all(len(one) == 1 for one in sums)
    return AgentExample(prompt, f"{', '.join(sums)} \\boxed{{{total}}}", is_easy, {"answer": str(total)})


_FUNCTIONS = ("score", "price", "level", "speed", "width", "total")
_OPERATIONS = {
    "add {k}": "x += {k}",
    "subtract {k}": "x -= {k}",
    "multiply by {k}": "x *= {k}",
    "divide by {k}": "x //= {k}",
    "keep at most {k}": "x = min(x, {k})",
    "keep at least {k}": "x = max(x, {k})",
    "square": "x *= x",
    "negate": "x = -x",
}


def code(random: Random) -> AgentExample:
    """Write a function of three steps; three assertions test it."""
    name, steps = random.choice(_FUNCTIONS), random.sample(list(_OPERATIONS), 3)
    constants = [random.randrange(2, 10) for _ in steps]
    words = ", ".join(step.format(k=k) for step, k in zip(steps, constants, strict=True))
    lines = [_OPERATIONS[step].format(k=k) for step, k in zip(steps, constants, strict=True)]
    body = "".join(f"    {line}\n" for line in lines)
    scope: dict[str, Any] = {}
    exec(f"def {name}(x):\n{body}    return x", scope)  # made of the constants above
    tests = [f"assert {name}({x}) == {scope[name](x)}" for x in random.sample(range(-20, 40), 3)]
    is_easy = not {"square", "negate"} & set(steps)
    return AgentExample(f"{name}: {words}", f"def {name}(x):\n{body}    return x", is_easy, {"answer": tests})


_NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo")
_THINGS = ("pens", "cups", "hats", "keys", "nuts", "figs", "bags", "maps")
_STORIES = {
    "{name} has {a} {things} and finds {b}": "{a} + {b}",
    "{name} has {a} {things} and loses {b}": "{a} - {b}",
    "{name} has {a} boxes of {b} {things}": "{a} * {b}",
    "{name} has {a} {things}, finds {b} and loses {c}": "{a} + {b} - {c}",
    "{name} has {a} boxes of {b} {things} and finds {c}": "{a} * {b} + {c}",
}


def tools(random: Random) -> AgentExample:
    """Solve a word problem on two-digit numbers with the tool `calculator`."""
    story, expression = random.choice(list(_STORIES.items()))
    a, b, c = sorted(random.sample(range(10, 100), 3), reverse=True)
    arguments = {"expression": expression.format(a=a, b=b, c=c)}
    prompt = story.format(name=random.choice(_NAMES), things=random.choice(_THINGS), a=a, b=b, c=c)
    value = calculate(arguments["expression"])
    is_easy = len(arguments["expression"]) == 7 and "*" not in arguments["expression"]
    return AgentExample(prompt, value, is_easy, {"answer": value}, arguments)


_THINGS_WITH_NUMBERS = (
    *("boat", "door", "tent", "lamp", "kite", "roof", "cart", "bell", "barn", "desk", "flag", "gate"),
    *("mug", "ring", "sofa", "wall"),
)
_COLOURS = ("red", "green", "blue", "black", "white", "brown", "pink", "gold")


def search(random: Random) -> AgentExample:
    """Look up a made-up fact with the tool `search`."""
    thing, number = random.choice(_THINGS_WITH_NUMBERS), random.randrange(100, 1000)
    colour = random.choice(_COLOURS)
    return AgentExample(
        f"which colour is {thing} {number}?",
        colour,
        thing in _THINGS_WITH_NUMBERS[:6],
        {"answer": colour},
        {"query": f"{thing} {number}"},
        f"The {thing} {number} is {colour}.",
    )


_WORDS = (
    *("tea", "rice", "soup", "fish", "cake", "plum", "bread", "milk"),
    *("corn", "salt", "beans", "honey", "juice", "melon", "pasta", "salad"),
)
_CASES = {
    "in capitals": (str.upper, "change_case:english_capital"),
    "in small letters": (str.lower, "change_case:english_lowercase"),
}
_LAYOUTS = {
    "in quotes": ('"{}"', "startend:quotation", {}),
    "with a title": ("<<Food>> {}", "detectable_format:title", {}),
    "as a list": ("* {}", "detectable_format:number_bullet_lists", {"num_bullets": 3}),
}


def chat(random: Random) -> AgentExample:
    """Name three things as told: the case of letters and the layout, which a program can check."""
    named = random.sample(_WORDS, 3)
    (case, (apply, case_id)), layout = random.choice(list(_CASES.items())), random.choice(list(_LAYOUTS))
    pattern, layout_id, arguments = _LAYOUTS[layout]
    text = pattern.format(("\n* " if layout == "as a list" else " ").join(named))
    return AgentExample(
        f"name {', '.join(named)} {case}, {layout}",
        apply(text),
        case == "in capitals" and layout != "as a list",
        {
            "instruction_id_list": ["keywords:existence", case_id, layout_id],
            "kwargs": [{"keywords": named}, {}, arguments],
        },
    )


DOMAINS: Mapping[str, Callable[[Random], AgentExample]] = {
    task.__name__: task for task in (math, code, search, tools, chat)
}


def splits(domain: str, sizes: Mapping[str, int], seed: int) -> dict[str, list[AgentExample]]:
    """Draw disjoint lists of examples of one domain, named and sized by `sizes`; no prompt occurs twice."""
    random, seen = Random(f"{seed}/agent/{domain}"), set[str]()
    result: dict[str, list[AgentExample]] = {}
    for split, size in sizes.items():
        rows = result[split] = []
        while len(rows) < size:
            example = DOMAINS[domain](random)
            if example.prompt not in seen:
                seen.add(example.prompt)
                rows.append(example)
    return result
