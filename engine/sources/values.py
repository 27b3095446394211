"""Turns bytes in any encoding into text, and values into what JSON can hold."""

import codecs
import datetime
import decimal
import json
import math
from typing import Any

from manifests.errors import ConfigError


def decoded(data: bytes) -> tuple[str, bool]:
    """Returns text, and whether it is exact: UTF-8, or UTF-16 with its mark; else UTF-8 with replacement characters."""
    try:
        return data.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        pass
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return data.decode("utf-16"), True
        except UnicodeDecodeError:
            pass
    return data.decode("utf-8", "replace"), False


def parsed(data: bytes | str) -> Any:
    """Parses JSON text as plain values. Raises ValueError if it is not JSON."""
    try:
        return plain(json.loads(data))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def plain(value: Any) -> Any:
    """Turns a value into what JSON can hold: times as ISO 8601, decimals as floats, NaN and infinity as None."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case str():
            return _without_surrogates(value)
        case dict():
            return {_without_surrogates(str(name)): plain(below) for name, below in value.items()}
        case list() | tuple():
            return [plain(below) for below in value]
        case decimal.Decimal():
            return plain(float(value))
        case datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta():
            return value.total_seconds()
        case bytes():
            return decoded(value)[0]
    return str(value)


def key_text(value: Any, where: str) -> str:
    """Returns the value of a key field as text. Raises ConfigError, which begins with `where`, if it cannot be a key."""
    text = plain(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not text.strip():
        raise ConfigError(f"{where} is {value!r}, expected text or an integer that is not empty")
    return text


def _without_surrogates(text: str) -> str:
    # JSON may spell half a character (\ud83d), which no file can hold.
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
