"""The training text: dialogues generated from `facts.py` and from arithmetic.

Nothing is downloaded. A dialogue is a list of chat messages; `Corpus(seed).dialogue(...)` draws
one. It mixes three kinds of turns: questions about the project, sums of two numbers from 0 to 99,
and questions that the model must decline.

About a tenth of all pairs of numbers is *held out*: `is_held_out` decides this by a hash that is
the same for a + b and b + a, and no training text contains such a sum. `evaluate.py` asks only
these, so a right answer was computed and not remembered.
"""

from __future__ import annotations

import hashlib
import random
import re

from demo.facts import (
    FOREIGN,
    FOREIGN_QUESTIONS,
    ONLY_ADDITION,
    REFUSAL,
    SYSTEM_PROMPTS,
    TOPICS,
    Topic,
)

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Turn = tuple[str, str]  # what the user says, what the assistant answers

LIMIT = 100  # numbers are below this

SUM_QUESTIONS: list[str] = [
    "What is {a} + {b}?", "{a}+{b}", "{a} + {b}", "{a} plus {b}", "Can you add {a} and {b}?",
    "What is {a}+{b}?", "{a} + {b} =", "{a}+{b}=?", "{a} + {b} = ?", "What's {a} plus {b}?",
    "Add {a} and {b}.", "How much is {a} + {b}?", "What is the sum of {a} and {b}?",
    "Calculate {a} + {b}.", "Please add {a} and {b}.", "What does {a} + {b} give?",
    "Tell me {a} plus {b}.", "And {a} + {b}?", "Compute {a}+{b}", "What is {a} and {b} together?",
]
DEFINITIONS: list[str] = [
    "What is {x}?", "What is {x}?", "What's {x}?", "What does {x} mean?", "Explain {x}.",
    "Can you explain {x}?", "Tell me about {x}.", "Define {x}.", "{x}?", "And {x}?",
    "What about {x}?", "Please explain {x} to me.", "I don't understand {x}.",
    "What do you know about {x}?", "Could you tell me what {x} is?",
]
OPENINGS: list[str] = ["Hi! ", "Hello, ", "Hey, ", "Please, ", "Quick question: ", "Ok. ", "So, "]
OTHER_ARITHMETIC: list[str] = [
    "What is {a} * {b}?", "{a} - {b}", "What is {a} times {b}?", "{a} / {b}", "{a} minus {b}",
    "What is {a} divided by {b}?", "Multiply {a} and {b}.", "{a}*{b}", "What is {a} - {b}?",
    "What is the square root of {a}?", "What is {c} + {b}?", "{a} + {c}", "{c} plus {c}", "{c}+{b}",
]


def is_held_out(a: int, b: int) -> bool:
    """Whether a + b (and so b + a) is held out of the training text: about one pair in ten."""
    low, high = sorted((a, b))
    return hashlib.sha256(f"{low}+{high}".encode()).digest()[0] < 26  # 26 of 256


def held_out_pairs() -> list[tuple[int, int]]:
    """All ordered pairs that are held out."""
    return [(a, b) for a in range(LIMIT) for b in range(LIMIT) if is_held_out(a, b)]


def sum_answer(a: int, b: int) -> str:
    """The answer to every phrasing of one addition."""
    return f"{a} + {b} = {a + b}."


class Corpus:
    """A source of dialogues; the same seed gives the same dialogues."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed)

    def dialogue(self, max_turns: int = 3) -> list[Message]:
        """One conversation of 1 to `max_turns` turns; a third of them have a system prompt."""
        turns = 1
        while turns < max_turns and self.random.random() < 0.4:
            turns += 1
        messages: list[Message] = []
        if self.random.random() < 0.3:
            system = self.random.choice(SYSTEM_PROMPTS)
            messages.append({"role": "system", "content": system})
        for _ in range(turns):
            question, answer = self.turn()
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return messages

    def turn(self) -> Turn:
        """One question with its answer. Sums are the most frequent, as the hardest to learn."""
        kind = self.random.random()
        if kind < 0.50:
            return self.addition()
        if kind < 0.62:
            return self.list_of_additions()
        if kind < 0.91:
            return self.about_topic()
        return self.declined()

    def addition(self) -> Turn:
        """One sum in one of many phrasings."""
        a, b = self.pair()
        question = self.random.choice(SUM_QUESTIONS).format(a=a, b=b)
        return self.reword(question), sum_answer(a, b)

    def list_of_additions(self) -> Turn:
        """Several sums at once: more digits to learn from per token."""
        pairs = [self.pair() for _ in range(self.random.randint(2, 5))]
        sign = self.random.choice(["+", " + "])
        question = ", ".join(f"{a}{sign}{b}" for a, b in pairs)
        return question, ", ".join(sum_answer(a, b)[:-1] for a, b in pairs) + "."

    def pair(self) -> tuple[int, int]:
        """Two numbers whose sum may be trained on, each pair equally likely."""
        while True:
            a, b = self.random.randrange(LIMIT), self.random.randrange(LIMIT)
            if not is_held_out(a, b):
                return a, b

    def about_topic(self, topic: Topic | None = None) -> Turn:
        """A question about this project or about sharded inference."""
        topic = topic or self.random.choice(TOPICS)
        templates = DEFINITIONS if topic.names else []
        # Whole questions are as likely as definitions, whichever list is longer.
        if topic.questions and (not templates or self.random.random() < 0.5):
            question = self.random.choice(topic.questions)
        else:
            name = self.random.choice(topic.names)
            question = _capitalised(self.random.choice(templates).format(x=name))
        return self.reword(question), self.random.choice(topic.answers)

    def declined(self) -> Turn:
        """A question outside the model's knowledge, with a polite refusal."""
        if self.random.random() < 0.25:
            a, b = self.pair()
            c = self.random.randrange(LIMIT, 2000)
            question = self.random.choice(OTHER_ARITHMETIC).format(a=a, b=b, c=c)
            return self.reword(question), ONLY_ADDITION
        if self.random.random() < 0.3:
            return self.reword(self.random.choice(FOREIGN_QUESTIONS)), REFUSAL
        subject = self.random.choice(FOREIGN)
        question = _capitalised(self.random.choice(DEFINITIONS).format(x=subject))
        return self.reword(question), REFUSAL

    def reword(self, question: str) -> str:
        """Varies a question as people do: an opening, no capitals, no period, a typo."""
        chance = self.random.random
        if chance() < 0.12:
            question = self.random.choice(OPENINGS) + question
        if chance() < 0.3:
            question = question.lower()
        if chance() < 0.25:
            question = question.rstrip("?.!")
        if chance() < 0.12:
            question = self.slip(question)
        return question

    def slip(self, text: str) -> str:
        """Drop, double or swap one letter in a word of four or more (never touch a digit)."""
        words = list(re.finditer(r"[A-Za-z]{4,}", text))
        if not words:
            return text
        word = self.random.choice(words)
        i = self.random.randrange(word.start() + 1, word.end() - 1)
        dropped = text[:i] + text[i + 1 :]
        doubled = text[:i] + text[i] + text[i:]
        swapped = text[:i] + text[i + 1] + text[i] + text[i + 2 :]
        return self.random.choice([dropped, doubled, swapped])


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
