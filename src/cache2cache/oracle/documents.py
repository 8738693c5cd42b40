"""Short generated documents and questions about their structure: roles and nesting, keys, argument order.

Every option stands in the document, so knowing its words doesn't answer anything: which word stands where does.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import C2CError
from ..tasks.base import Question

# fmt: off
WORDS = (
    "anchor", "apple", "arrow", "basket", "beacon", "bottle", "bridge", "button", "candle", "carpet", "castle", "cedar",
    "cherry", "circle", "copper", "cotton", "dragon", "engine", "falcon", "feather", "forest", "garden", "hammer",
    "harbor", "island", "jacket", "kettle", "ladder", "lantern", "lemon", "magnet", "marble", "meadow", "mirror",
    "needle", "orange", "paper", "pebble", "pencil", "pepper", "pillow", "planet", "pocket", "rabbit", "ribbon",
    "river", "rocket", "saddle", "shadow", "silver", "spider", "spoon", "stone", "summer", "table", "thunder", "ticket",
    "tiger", "timber", "tunnel", "turtle", "valley", "velvet", "violin", "walnut", "wagon", "window", "winter", "zebra",
)
TAGS = ("article", "aside", "block", "footer", "frame", "group", "header", "item", "list", "note", "panel", "section")
ROLES = ("admin", "assistant", "author", "editor", "guest", "owner", "reader", "system", "user")
KEYS = ("city", "code", "color", "genre", "label", "metal", "mood", "name", "owner", "shape", "style", "title", "topic")
FUNCTIONS = ("blend", "build", "copy", "draw", "fetch", "join", "load", "merge", "move", "pack", "send", "swap", "wrap")
PARAMETERS = ("base", "dest", "extra", "first", "key", "left", "mask", "mode", "path", "right", "root", "source")
# fmt: on
ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Document:
    """A document and a question about it, whose `subject` is the kind of structure."""

    text: str
    question: Question


Made = tuple[str, str, str, list[str]]  # document, question, right option, candidates for wrong ones


def _options(generator: random.Random, right: str, wrong: Sequence[str], place: int) -> tuple[str, ...]:
    """The right one in its place among three wrong ones."""
    options = generator.sample([w for w in dict.fromkeys(wrong) if w != right], 3)
    return (*options[:place], right, *options[place:])


def _roles(generator: random.Random) -> Made:
    """Who said a word, in marked-up turns."""
    roles, words = generator.sample(ROLES, 5), generator.sample(WORDS, 5)
    turns = [f'<turn role="{role}">{word}</turn>' for role, word in zip(roles, words, strict=True)]
    asked = generator.randrange(5)
    return "\n".join(turns), f'What is the role of the turn that says "{words[asked]}"?', roles[asked], roles


def _nesting(generator: random.Random) -> Made:
    """Which element is around a word, in nested markup."""
    tags, words = generator.sample(TAGS, 6), generator.sample(WORDS, 4)
    outer, (a, b), (c, d, e) = tags[0], tags[1:3], tags[3:]
    text = (
        f"<{outer}><{a}><{c}>{words[0]}</{c}>{words[1]}</{a}>"
        f"<{b}>{words[2]}<{d}><{e}>{words[3]}</{e}></{d}></{b}></{outer}>"
    )
    parents = {words[0]: [c, a, outer], words[1]: [a, outer], words[2]: [b, outer], words[3]: [e, d, b, outer]}
    if generator.random() < 0.5:
        word = generator.choice(words)
        return text, f'Which element is directly around the word "{word}"?', parents[word][0], tags
    child, parent = generator.choice([(c, a), (d, b), (e, d), (a, outer), (b, outer)])
    return text, f"Which element is the direct parent of <{child}>?", parent, [t for t in tags if t != child]


def _keys(generator: random.Random) -> Made:
    """Which key has a value, or what a key has in one of several objects with the same keys."""
    names, keys, words = generator.sample(WORDS, 3), generator.sample(KEYS, 3), list(WORDS)
    words = generator.sample([w for w in words if w not in names], 9)
    values = {name: dict(zip(keys, words[3 * i : 3 * i + 3], strict=True)) for i, name in enumerate(names)}
    text = json.dumps(values, indent=1)
    name, key = generator.choice(names), generator.choice(keys)
    if generator.random() < 0.5:
        wrong = [values[n][k] for n in names for k in keys if n == name or k == key]
        return text, f'What is "{key}" of "{name}"?', values[name][key], wrong
    return (
        text,
        f'Which object holds "{values[name][key]}"?',
        name,
        [*names, *generator.sample([w for w in words if w != values[name][key]], 1)],
    )


def _arguments(generator: random.Random) -> Made:
    """What is passed for which parameter, by position or by name."""
    function, parameters = generator.choice(FUNCTIONS), generator.sample(PARAMETERS, 4)
    values = generator.sample(WORDS, 4)
    by_name = generator.choice([0, 2])  # how many of the last arguments are passed by name, in another order
    passed = [f'"{value}"' for value in values[: 4 - by_name]]
    named = [f'{p}="{v}"' for p, v in zip(parameters[4 - by_name :], values[4 - by_name :], strict=True)]
    text = (
        f"def {function}({', '.join(parameters)}):\n    return [{', '.join(generator.sample(parameters, 4))}]\n\n"
        f"{function}({', '.join([*passed, *reversed(named)])})"
    )
    asked = generator.randrange(4)
    if generator.random() < 0.5:
        return text, f"Which value does the parameter {parameters[asked]} get in the call?", values[asked], values
    position = generator.randrange(4)
    asked_for = f"Which is the {ORDINALS[position]} parameter in the definition of {function}?"
    return text, asked_for, parameters[position], parameters


KINDS: dict[str, tuple[Callable[[random.Random], Made], ...]] = {
    "markup": (_roles, _nesting),
    "json": (_keys,),
    "code": (_arguments,),
}


def generate(count: int, seed: int = 0) -> list[Document]:
    """`count` documents, as many of each kind as of the others, none twice."""
    if count < 1:
        raise C2CError(f"{count} documents were asked for; expected at least one")
    generator = random.Random(seed)
    made: list[Document] = []
    seen: set[str] = set()
    while len(made) < count:
        number = len(made)
        kind = list(KINDS)[number % len(KINDS)]
        makers, turn = KINDS[kind], number // len(KINDS)
        text, asked, right, wrong = makers[turn % len(makers)](generator)
        if text in seen:
            continue
        seen.add(text)
        answer = turn // len(makers) % 4  # every letter as often as the others
        options = _options(generator, right, wrong, answer)
        made.append(Document(text, Question(f"{kind}-{number}", asked, options, answer, kind)))
    return made
