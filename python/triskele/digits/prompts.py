"""Prompts of the digit models: which digit a text names, and the vector that stands for it.

A full text encoder would be a thousand times the size of the models it steers. One digit has eleven
states (ten digits, or none), so one token with a one-hot vector says everything.
"""

from __future__ import annotations

import re

import torch

TEXT_DIM = 16  # width of a prompt embedding: ten digits, the null prompt, five zeros
NULL_CLASS = 10

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NAMED = re.compile(r"(?<!\d)\d(?!\d)|\b(?:" + "|".join(_WORDS) + r")\b", re.IGNORECASE)


def parse_digit(prompt: str) -> int:
    """The digit that a prompt such as "3", "a moving 3" or "a three" names.

    Raises ValueError when it names none, or two different ones; TypeError for what is no text.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt must be a str, got {type(prompt).__name__}")
    found = {int(word) if word.isdigit() else _WORDS.index(word.lower()) for word in _NAMED.findall(prompt)}
    if len(found) != 1:
        problem = "names no digit" if not found else f"names several digits {sorted(found)}"
        raise ValueError(f"the prompt {prompt!r} {problem}; expected one of 0-9, as in '3' or 'a moving 3'")
    return found.pop()


def embed_labels(labels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Labels [N], 0-9 or NULL_CLASS -> prompt embeddings [N, 1, TEXT_DIM], one-hot."""
    embeds = torch.zeros(len(labels), 1, TEXT_DIM, dtype=dtype, device=labels.device)
    return embeds.scatter_(2, labels.view(-1, 1, 1), 1.0)
