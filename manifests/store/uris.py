"""Tells a URI from a path, makes paths absolute, and takes credentials out of a URI."""

import os
import re
from pathlib import Path

_URI = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*(::|://)")


def without_credentials(text: str) -> str:
    """Returns the text with user, password and query taken out of every URI in it."""
    if "://" not in text:
        return text
    bare = re.sub(r"(?<=://)[^/\s]*@", "", text)
    return re.sub(r"\?((?!::)\S)*", "", bare)


def is_uri(text: str) -> bool:
    """Tells whether the text is an fsspec URI (`s3://bucket/photos`), not a path of this machine."""
    return bool(_URI.match(text))


def absolute(text: str, folder: Path) -> str:
    """Makes a path absolute against `folder` and expands `~`; leaves URIs as they are."""
    return text if is_uri(text) else os.path.abspath(os.path.join(folder, os.path.expanduser(text)))
