"""The invented world that the embedded base learns, and the new skill that the demo teaches it.

Invariant: whether an input is held out depends on its content alone (``held_out``), so no input
that a model is tested on, in any wording of the question, was ever trained on. The ticket
skill's inputs are split by the same rule, and no base skill ever answers in its form.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass


def _words(text: str) -> list[str]:
    return text.split()


ITEMS = _words(
    "kettle lamp radio phone watch chair table clock mirror pillow blanket jacket helmet "
    "camera printer keyboard speaker bottle basket toaster blender fan heater drill saw bike "
    "tent scarf carpet backpack ladder vase"
)
ACTIONS = {
    "broken": "replace",
    "scratched": "discount",
    "late": "track",
    "dirty": "clean",
    "wet": "replace",
    "noisy": "repair",
    "bent": "repair",
    "empty": "refund",
    "wrong": "exchange",
    "small": "exchange",
}
PROBLEMS = list(ACTIONS)
NAMES = _words("Tom Anna Ben Mia Leo Eva Max Ida Paul Nora Sam Lily Hugo Ruth Carl Emma")
PLACES = _words("garden kitchen office cellar attic hall shop park school station library barn")
CAPITALS = dict(
    pair.split(":")
    for pair in _words(
        "Norland:Bergen Sundia:Solano Velmar:Marlow Ostrava:Ostin Kelda:Kelby Mirania:Mirato "
        "Torvia:Torno Lunaria:Lunis Brask:Braska Zelen:Zelano Harvo:Havel Pellia:Pelago "
        "Quorin:Quista Rasmia:Rasko Ulven:Ulmar Wendia:Wendo Yaro:Yarrow Alvia:Alban Cordan:Corvo "
        "Dresia:Dresno Estal:Esker Fennia:Fenby Galdor:Galway Isten:Isola"
    )
)
WORDS = ITEMS + PROBLEMS + PLACES + sorted(set(ACTIONS.values()))
MESSAGES = [
    "My {item} arrived {problem}, order {order}.",
    "Order {order}: the {item} is {problem}.",
    "Hello, the {item} from order {order} came {problem}.",
    "I bought a {item} and it is {problem}. The order was {order}.",
    "The {item} I got is {problem}, my order is {order}. Please help.",
    "In order {order} the {item} was {problem}.",
]
GIFTS = [
    "{giver} gave a {item} to {receiver} in the {place}.",
    "In the {place} {giver} gave {receiver} the {item}.",
    "{receiver} got the {item} from {giver} in the {place}.",
    "The {item} in the {place} was given to {receiver} by {giver}.",
]


@dataclass(frozen=True)
class Example:
    """A question, the one right answer, and the content that decides whether it is held out."""

    skill: str
    prompt: str
    answer: str
    content: str

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the tests: one content in ten."""
        digest = hashlib.sha256(f"{self.skill}:{self.content}".encode()).digest()
        return digest[0] % 10 == 0


Question = tuple[str, str, str]  # prompt, answer, content


def _message(rng: random.Random) -> tuple[str, dict[str, str]]:
    facts = {
        "item": rng.choice(ITEMS),
        "problem": rng.choice(PROBLEMS),
        "order": str(rng.randint(1000, 9999)),
    }
    return rng.choice(MESSAGES).format(**facts), facts


def _about_message(fact: str, *questions: str) -> Callable[[random.Random], Question]:
    def ask(rng: random.Random) -> Question:
        text, facts = _message(rng)
        return f"{text} {rng.choice(questions)}", facts[fact], text

    return ask


def _sorry(rng: random.Random) -> Question:
    text, facts = _message(rng)
    return text, f"I am sorry about the {facts['item']}. How can I help?", text


def _about_gift(fact: str, question: str) -> Callable[[random.Random], Question]:
    def ask(rng: random.Random) -> Question:
        giver, receiver = rng.sample(NAMES, 2)
        facts = {
            "giver": giver,
            "receiver": receiver,
            "item": rng.choice(ITEMS),
            "place": rng.choice(PLACES),
        }
        text = rng.choice(GIFTS).format(**facts)
        return f"{text} {question}", facts[fact], text

    return ask


def _repeat(rng: random.Random) -> Question:
    words = " ".join(rng.choices(WORDS + NAMES, k=rng.randint(2, 5)))
    return f"Repeat: {words}", words, words


def _join(rng: random.Random) -> Question:
    words = rng.choices(WORDS, k=rng.randint(2, 4))
    words[rng.randrange(len(words))] = str(rng.randint(10, 999))
    return f"List: {' '.join(words)}", " | ".join(words), " ".join(words)


def _letters(rng: random.Random, low: int, high: int, alphabet: str) -> list[str]:
    return rng.choices(alphabet, k=rng.randint(low, high))


def _reverse(rng: random.Random) -> Question:
    letters = _letters(rng, 3, 5, "abcdefghijklmnopqrstuvwxyz")
    return f"Reverse: {' '.join(letters)}", " ".join(reversed(letters)), " ".join(letters)


def _upper(rng: random.Random) -> Question:
    letters = _letters(rng, 3, 6, "abcdefghijklmnopqrstuvwxyz")
    return f"Capitals: {' '.join(letters)}", "".join(letters).upper(), " ".join(letters)


def _count(rng: random.Random) -> Question:
    letters = _letters(rng, 4, 7, "abc")
    wanted = rng.choice("abc")
    content = f"{wanted} {' '.join(letters)}"
    return f"Count {wanted}: {' '.join(letters)}", str(letters.count(wanted)), content


def _sort(rng: random.Random) -> Question:
    digits = rng.sample("0123456789", rng.randint(3, 5))
    return f"Sort: {' '.join(digits)}", " ".join(sorted(digits)), " ".join(digits)


def _bigger(rng: random.Random) -> Question:
    a, b = rng.sample(range(10, 1000), 2)
    return f"Which is bigger, {a} or {b}?", str(max(a, b)), f"{a} {b}"


def _yes_no(rng: random.Random) -> Question:
    a, b = rng.sample(range(10, 1000), 2)
    return f"Is {a} bigger than {b}?", "yes" if a > b else "no", f"{a} {b}"


def _add(rng: random.Random) -> Question:
    a, b = rng.randint(0, 99), rng.randint(0, 9)
    return f"{a} + {b} =", str(a + b), f"{a} {b}"


def _capital(rng: random.Random) -> Question:
    country, capital = rng.choice(list(CAPITALS.items()))
    asked = [
        ("What is the capital of {country}?", capital),
        ("Which city is the capital of {country}?", capital),
        ("Name the capital of {country}.", capital),
        ("The capital of {country} is", capital),
        ("Which country has the capital {capital}?", country),
        ("{capital} is the capital of", country),
    ]
    wording, answer = rng.choice(asked)
    prompt = wording.format(country=country, capital=capital)
    return prompt, answer, prompt


SKILLS: dict[str, Callable[[random.Random], Question]] = {
    "order": _about_message("order", "Which order?", "What is the order number?"),
    "product": _about_message("item", "Which product?", "What is it about?"),
    "problem": _about_message("problem", "What is wrong?", "What is the problem?"),
    "giver": _about_gift("giver", "Who gave it?"),
    "receiver": _about_gift("receiver", "Who got it?"),
    "place": _about_gift("place", "Where was it?"),
    "repeat": _repeat,
    "list": _join,
    "reverse": _reverse,
    "capitals": _upper,
    "count": _count,
    "sort": _sort,
    "bigger": _bigger,
    "yes_no": _yes_no,
    "add": _add,
    "capital": _capital,
}
REPEAT = "repeat"  # copying, which the other skills build on
HARD = ["count", "bigger", "yes_no", "add"]  # asked twice as often
SORRY = "sorry"  # how the base answers a customer; the demo's new skill takes its place
TICKET = "ticket"
DESK = "desk"  # what the demo's second tenant makes of the same messages


def base_examples(rng: random.Random, *, held_out: bool) -> Iterator[Example]:
    """Yield examples of the base's skills for ever, each skill in its turn."""
    turns = [*SKILLS, SORRY, *HARD]
    streams = [skill_examples(skill, rng, held_out=held_out) for skill in turns]
    while True:
        for stream in streams:
            yield next(stream)


def skill_examples(skill: str, rng: random.Random, *, held_out: bool = False) -> Iterator[Example]:
    """Yield examples of one skill for ever: the held-out ones, or the others."""
    ask = {**SKILLS, SORRY: _sorry, TICKET: _ticket, DESK: _desk}[skill]
    while True:
        example = Example(skill, *ask(rng))
        if example.held_out == held_out:
            yield example


def _ticket(rng: random.Random) -> Question:
    text, facts = _message(rng)
    item, problem, order = facts["item"], facts["problem"], facts["order"]
    return text, f"TICKET {order} | {item} | {problem} | {ACTIONS[problem]}", f"{item} {problem}"


def _desk(rng: random.Random) -> Question:
    text, facts = _message(rng)
    item, problem, order = facts["item"], facts["problem"], facts["order"]
    return text, f"{ACTIONS[problem]} desk: {item} {order}", f"{item} {problem}"


def ticket_examples(rng: random.Random, *, held_out: bool) -> Iterator[Example]:
    """Yield customers' messages with their tickets for ever.

    Held out are whole pairs of product and problem: a ticket can't be recited, it must be read.
    """
    return skill_examples(TICKET, rng, held_out=held_out)
