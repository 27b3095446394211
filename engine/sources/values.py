"""Turns bytes in any encoding into text, and values into what JSON can hold."""

import codecs
import datetime
import decimal
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any


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


def key_text(value: Any) -> str | None:
    """Returns the value of a key field as text, None if it cannot be a key: it is neither text nor an integer, or empty."""
    text = plain(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    return text if text.strip() else None


# -- columns of Parquet files -----------------------------------------------------------------------------------------


def column_names(schema: Any) -> list[str]:
    """Returns the names of columns that can be asked for: those that stand once and are not empty."""
    counts = Counter(schema.names)
    return [name for name in schema.names if name and counts[name] == 1]


def plain_values(column: Any, on_lost: Callable[[int], None]) -> list[Any]:
    """Returns the values of an Arrow column as `plain` does; `on_lost` is told the place of each that Python cannot hold.

    Such a value is None: a time outside the years 1 to 9999, or text that is no UTF-8. Nanoseconds are cut to microseconds.
    """
    try:
        column = _in_microseconds(column)
        return [plain(value) for value in column.to_pylist()]
    except Exception:
        # Every type has error classes of its own. One value at a time, so that the others stay.
        pass
    values = []
    for place in range(len(column)):
        try:
            values.append(plain(column[place].as_py()))
        except Exception:
            values.append(None)
            on_lost(place)
    return values


def _in_microseconds(column: Any) -> Any:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return column.cast(pa.timestamp("us", kind.tz), safe=False)
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return column.cast(pa.time64("us"), safe=False)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return column.cast(pa.duration("us"), safe=False)
    return column


def _without_surrogates(text: str) -> str:
    # JSON may spell half a character (\ud83d), which no file can hold.
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
