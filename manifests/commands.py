"""Writes the commands that messages and reports show, so that they can be pasted into a shell as they stand."""

import shlex

# What a shell reads between double quotes.
_SPECIAL = set('"$`\\!')


def command(*words: object) -> str:
    """Returns a command of modmill, such as `modmill status 'my workspace'`, each word quoted if a shell needs that."""
    return " ".join(["modmill", *(_quoted(str(word)) for word in words)])


def _quoted(word: str) -> str:
    # SQL is full of single quotes, each of which would need five characters between single ones.
    return f'"{word}"' if "'" in word and _SPECIAL.isdisjoint(word) else shlex.quote(word)
