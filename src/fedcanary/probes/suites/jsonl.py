"""One JSON object a line: the format of the packaged suites and of users' own.

    prompt    text, may be empty
    choices   one text or more, all different; one alone is scored by its likelihood per token
    answer    the index or the text of the right choice; null or absent where there is none (0 if there is one choice)
    group, pair, domain   text, optional
    positive  the index or the text of the favourable choice, optional

Blank lines are passed over. Other keys are an error: a misspelt key must not be dropped in silence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from fedcanary.errors import Problem, did_you_mean
from fedcanary.probes.suites.rows import Row
from fedcanary.types import Item

NEEDED: Final = ("prompt", "choices")
LABELS: Final = ("group", "pair", "domain")
KEYS: Final = (*NEEDED, "answer", *LABELS, "positive")


def read_jsonl(path: Path, text: str, problems: list[Problem]) -> list[Row]:
    """The items of a text, with every problem of every line."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(Problem(where, f"not JSON: {error}", "write one complete JSON object on each line"))
            continue
        item = read_item(where, value, problems)
        if item is not None:
            columns = {key: str(getattr(item, key)) for key in LABELS if getattr(item, key) is not None}
            rows.append(Row(where=where, item=item, columns=columns))
    return rows


def read_item(where: str, value: object, problems: list[Problem]) -> Item | None:
    """One decoded line as an item, or None with the reasons added to `problems`."""
    if not isinstance(value, dict):
        problems.append(Problem(where, f"a {type(value).__name__}, not an object", "write {...} with the item's keys"))
        return None
    before = len(problems)
    unknown = sorted(set(value) - set(KEYS))
    for key in unknown:
        problems.append(Problem(where, f"unknown key {key!r}", did_you_mean(key, KEYS)))
    for key in NEEDED:
        if key not in value:
            problems.append(Problem(where, f"key {key!r} is missing", f"add {key!r} to the object"))
    prompt = _text(where, "prompt", value["prompt"], problems) if "prompt" in value else ""
    choices = _choices(where, value["choices"], problems) if "choices" in value else ()
    labels = {}
    for key in LABELS:
        labels[key] = None if value.get(key) is None else _text(where, key, value[key], problems)
    answer = _index(where, "answer", value.get("answer"), choices, problems)
    positive = _index(where, "positive", value.get("positive"), choices, problems)
    if len(problems) > before:
        return None
    if answer is None and len(choices) == 1:
        answer = 0
    return Item(prompt=prompt, choices=choices, answer=answer, positive=positive, **labels)


def _text(where: str, key: str, value: object, problems: list[Problem]) -> str:
    if not isinstance(value, str):
        problems.append(Problem(where, f"{key!r} is a {type(value).__name__}", "write it as text, in quotes"))
        return ""
    try:
        value.encode()
    except UnicodeEncodeError:
        problems.append(Problem(where, f"{key!r} holds half a surrogate pair", "write the character itself, in UTF-8"))
        return ""
    return value


def _choices(where: str, value: object, problems: list[Problem]) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        what = "'choices' is not a list of at least one text"
        problems.append(Problem(where, what, 'write "choices": ["...", "..."]'))
        return ()
    choices = tuple(_text(where, f"choices[{index}]", choice, problems) for index, choice in enumerate(value))
    if any(isinstance(raw, str) and not raw.strip() for raw in value):
        problems.append(Problem(where, "a choice is empty", "give every choice some text"))
    twice = sorted({choice for choice in choices if choice and choices.count(choice) > 1})
    for choice in twice:
        problems.append(Problem(where, f"the choice {choice!r} is given twice", "keep one of them"))
    return choices


def _index(where: str, key: str, value: object, choices: tuple[str, ...], problems: list[Problem]) -> int | None:
    if value is None or not choices:
        return None
    if isinstance(value, str):
        if value in choices:
            return choices.index(value)
        problems.append(Problem(where, f"{key!r} is not one of the choices: {value!r}", did_you_mean(value, choices)))
    elif isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(choices):
            return value
        what = f"{key!r} is {value}, and there are {len(choices)} choices"
        problems.append(Problem(where, what, f"use 0 to {len(choices) - 1}, or the choice's text"))
    else:
        problems.append(Problem(where, f"{key!r} is a {type(value).__name__}", "use an index or the choice's text"))
    return None
