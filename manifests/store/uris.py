"""Tells a URI from a path, and takes credentials out of one."""

import re

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
