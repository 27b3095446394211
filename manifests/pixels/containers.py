"""Reads the structure of picture files, chunk by chunk, for what Pillow does not check or should not read."""

import re
import zlib
from collections.abc import Iterator

_PNG_START = b"\x89PNG\r\n\x1a\n"
# Of the chunks that a reader may pass over, those that decide pixels; and of the texts, those that may say what is up.
_PNG_PIXELS = (b"tRNS", b"iCCP", b"eXIf")
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_ORIENTED = (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp")
# More of what is compressed is not looked at, so that a few bytes cannot cost minutes.
_COMPRESSED_CHUNKS = 4
INFLATED_BYTES = 16 << 20
_INFLATED_TEXT_BYTES = 1 << 20
_TEXT_BYTES = 16 << 20
# A marker in the coded data of a JPEG: not a stuffed 0, not a restart, not a fill byte.
_JPEG_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
_JPEG_STANDALONE = (0x01, *range(0xD0, 0xD9))
_JPEG_END, _JPEG_SCAN = 0xD9, b"\xda"
# Segments that fail a picture in Pillow if they hold fewer bytes, by marker.
_JPEG_LEAST = {b"\xe0": (b"JFIF", 7), b"\xe2": (b"ICC_PROFILE\0", 14), b"\xee": (b"Adobe", 7)}
# The brands of ISO media files that are pictures. `mif1` and `msf1` say nothing of their codec: it is in the brands behind.
AVIF_BRANDS = frozenset((b"avif", b"avis"))
HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"))


def png_without_text(data: bytes) -> bytes:
    """Returns a PNG without the chunks that decide neither its pixels nor what is up; what is damaged stays as it is.

    Of an animation its first frame stays, which is the picture of a reader that knows none.
    """
    kept, begin = [], 0
    for _, at, end, is_needed in _png_chunks(data):
        if not is_needed:
            kept.append(data[begin:at])
            begin = end
    return b"".join([*kept, data[begin:]]) if kept else data


def png_fault(data: bytes) -> str | None:
    """Tells what is wrong with a PNG: the checksum of a chunk that is needed, or its end. None if nothing is."""
    view, name = memoryview(data), b""
    for name, at, end, is_needed in _png_chunks(data):
        if is_needed and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            return f"the checksum of {name.decode('latin-1')} is wrong"
    return None if name == b"IEND" else "it has no IEND"


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int, bool]]:
    """Yields of each whole chunk up to IEND its name, where it begins and ends, and whether it is needed."""
    at, compressed = len(_PNG_START), 0
    while at + 12 <= len(data):
        name, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return
        # A lower letter at first: a reader may pass over the chunk.
        is_needed = not name[:1].islower() or name in _PNG_PIXELS
        if name == b"iCCP" or (name in _PNG_TEXTS and data.startswith(_PNG_ORIENTED, at + 8)):
            compressed += 1
            is_needed = compressed <= _COMPRESSED_CHUNKS and _is_small(name, data[at + 8 : end - 4])
        yield name, at, end, is_needed
        if name == b"IEND":
            return
        at = end


def _is_small(name: bytes, body: bytes) -> bool:
    """Tells whether a profile or text, inflated if it is compressed, is of a size that people need."""
    key, _, rest = body.partition(b"\0")
    if name != b"iCCP" and (key not in _PNG_ORIENTED or len(rest) > _TEXT_BYTES):
        return False
    if name == b"tEXt" or (name == b"iTXt" and rest[:1] == b"\0"):
        return True
    if name == b"iTXt":
        # How it is compressed, a language, the keyword in it, and the text.
        rest = rest[1:2] + rest[2:].split(b"\0", 2)[-1]
    if rest[:1] != b"\0":
        return False
    stream = zlib.decompressobj()
    try:
        stream.decompress(rest[1:], INFLATED_BYTES if name == b"iCCP" else _INFLATED_TEXT_BYTES)
    except zlib.error:
        # Pillow passes over it by itself.
        return True
    return not stream.unconsumed_tail


def jpeg_without_broken(data: bytes) -> bytes:
    """Returns a JPEG without the headers, profiles and color marks that are too short to say anything."""
    kept, begin, at = [], 0, 2
    while data[at : at + 1] == b"\xff" and (kind := data[at + 1 : at + 2]) not in (b"", _JPEG_SCAN):
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        name, least = _JPEG_LEAST.get(kind, (b"", 0))
        if end - at - 4 < least and data.startswith(name, at + 4) and data[end : end + 1] == b"\xff":
            kept.append(data[begin:at])
            begin = end
        at = end
    return b"".join([*kept, data[begin:]]) if kept else data


def has_jpeg_end(data: bytes) -> bool:
    """Tells whether a JPEG has its end mark, in its place behind a scan; what stands behind it is not looked at."""
    if data.endswith(b"\xff\xd9"):
        return True
    at = 2
    while found := _JPEG_MARKER.search(data, at):
        kind, at = found[1][0], found.end()
        if kind == _JPEG_END:
            return True
        if kind not in _JPEG_STANDALONE:
            at += int.from_bytes(data[at : at + 2], "big")
    return False


def iso_brands(data: bytes) -> frozenset[bytes]:
    """Returns the brands in the header of an ISO media file (HEIC, AVIF, MP4); none of any other."""
    if data[4:8] != b"ftyp":
        return frozenset()
    end = min(int.from_bytes(data[:4], "big"), len(data), 1024)
    return frozenset(data[at : at + 4] for at in (8, *range(16, end - 3, 4)))
