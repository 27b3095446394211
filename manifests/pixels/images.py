"""Decodes photographs to sRGB pixels and label files to raw values, and encodes both: the one guarded decoder.

A bad file is an error of its row (`DecodeError`), never a crash, a warning or a guess: the pixel cap is judged from the
header before a pixel is decoded, and a file that is truncated or fails a checksum of its format fails. (A JPEG whose
middle was overwritten can still decode; only the sha256 that ingest keeps tells.)
"""

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from PIL import AvifImagePlugin, ExifTags, Image, ImageCms, ImageFile, PngImagePlugin
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from manifests.errors import ConfigError, DecodeError
from manifests.pixels import containers

# Part of every fingerprint: raised by hand when `decode` or a function of `manifests/pixels/crops.py` gives other pixels.
# If only the pixels of some containers are others, raise those in CONTAINER_VERSIONS instead.
DECODER_VERSION: int = 1
# Part of the fingerprints of corpora that hold files of these suffixes: name, version and suffixes.
CONTAINER_VERSIONS = (("tiff", 2, (".tif", ".tiff")),)
PIXEL_CAP = 128_000_000
# Pillow keeps an image in one block of memory up to its block size, 16 MiB.
_ONE_BLOCK_BYTES = 8 << 20
NPY_START = b"\x93NUMPY"

# Pillow warns above this limit and refuses above twice it, in places that no caller can reach. Set once, here, so that
# a photograph within our cap never warns; above it `_open` has judged already.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, PIXEL_CAP)
# Callers decode in threads of their own.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
# A color profile of more than 1 MB fails a PNG otherwise.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, containers.INFLATED_BYTES)

_EXPECTED = "expected one whole JPEG, PNG, WebP, TIFF, GIF, BMP, AVIF or HEIC"
_EXPECTED_MAP = "expected a .npy, PNG or TIFF of numbers, shape (h, w) or (h, w, c)"
# What white may be in numbers without a scale of their own.
_WHITES = (1.0, 255.0, 65535.0, 4294967295.0)
# A range must not hang on a few pixels: this share of the numbers decides.
_SHARE = 0.99
# Numbers under this share of white come out black.
_BLACK = 1 / 16
# First bytes and opener by kind. Opened by class, not by `Image.open`, which judges the size by a limit of its own.
_KINDS: dict[str, tuple[tuple[bytes, ...], type[ImageFile.ImageFile]]] = {
    "JPEG": ((b"\xff\xd8\xff",), JpegImageFile),
    "PNG": ((b"\x89PNG\r\n\x1a\n",), PngImageFile),
    "WebP": ((b"RIFF",), WebPImageFile),
    "TIFF": ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImageFile),
    "GIF": ((b"GIF87a", b"GIF89a"), GifImageFile),
    "BMP": ((b"BM",), BmpImageFile),
    "AVIF": ((), AvifImagePlugin.AvifImageFile),
}
# What of a file Pillow is to read, if not all.
_READ: dict[str, Callable[[bytes], bytes]] = {
    "PNG": containers.png_without_text,
    "JPEG": containers.jpeg_without_broken,
}
# What else people put into image folders, so that the message can name it.
_OTHER_KINDS = {
    "SVG or other XML": (b"<svg", b"<?xml"),
    "HTML": (b"<!doctype", b"<html", b"<head", b"<body"),
    "PDF": (b"%pdf",),
}


@dataclass(frozen=True, kw_only=True)
class Photo:
    """Holds a decoded photograph: pixels uint8 (h, w, 3), and its true size, also if it was decoded smaller."""

    pixels: np.ndarray
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """Holds what a header says: the size as stored, and how many bytes the pixels and all of their decoding take."""

    width: int
    height: int
    pixel_bytes: int
    decode_bytes: int


def decode(data: bytes, *, pixel_cap: int = PIXEL_CAP) -> np.ndarray:
    """Decodes the photograph in `data` to sRGB: uint8 (h, w, 3), upright.

    JPEG, PNG, WebP, TIFF, GIF, BMP, AVIF and, with the extra `heif`, HEIC; of several frames or pages the first. In this
    order:

    - numbers of 16 bits keep their high byte (40000 becomes 156), in gray and in color alike, those of a 12-bit TIFF
      their high 8 bits; 32-bit integers and floats are scaled by the smallest of 1, 255, 65535 and 4294967295 that
      holds 99 % of them, and the rest is white; what is negative or not finite is 0;
    - if white is 65535 or more and 99 % of the numbers are under a sixteenth of it (12 bits in a file of 16), the file
      fails: it would come out black;
    - an ICC profile is applied (perceptual intent) unless it is broken or is for other channels; CMYK without one
      becomes red = (1 - C)(1 - K), and so on;
    - transparent pixels are composited on white; the EXIF orientation is applied.

    Text and other metadata that decides no pixel is not read. Raises DecodeError if `data` is no such file, is damaged or
    truncated (a JPEG without an end, a PNG with a wrong checksum), or has more than `pixel_cap` pixels.
    """
    return decode_photo(data, pixel_cap=pixel_cap).pixels


def decode_photo(data: bytes, *, short: int | None = None, pixel_cap: int = PIXEL_CAP) -> Photo:
    """Decodes as `decode` does. With `short`, a JPEG is scaled by the smallest of 1/1, 1/2, 1/4 and 1/8 that leaves its
    shorter side at least `short` px.

    This is libjpeg's scaled decode, which is quicker since it leaves frequencies out. All other files come at full size.
    """
    kind = _kind(data)
    with _blaming(f"{kind} of {len(data)} bytes", _EXPECTED):
        image = _open(data, kind, pixel_cap)
        width, height = image.size
        _check_whole(data, kind)
        _scale(image, short)
        image.load()
        # Pillow itself turns a TIFF while loading.
        orientation = 1 if kind == "TIFF" else _orientation(image)
        if kind == "TIFF":
            width, height = image.size
        elif orientation >= 5:
            width, height = height, width
        if kind in ("PNG", "TIFF") and _is_deep_color(image, data):
            _check_deep_color(image, data)
        pixels = _pixels(_to_rgb(image))
        # Freed before the turned copy is made.
        del image
        return Photo(pixels=_upright(pixels, orientation), width=width, height=height)


def header_of(data: bytes, *, short: int | None = None, pixel_cap: int = PIXEL_CAP) -> Header:
    """Reads the header of the photograph in `data`, to bound what a decode takes. Raises DecodeError as `decode`."""
    kind = _kind(data)
    with _blaming(kind, _EXPECTED):
        image = _open(data, kind, pixel_cap)
        width, height = image.size
        scale = _scale(image, short)
        stored = width * height
        pixels = math.ceil(width / scale) * math.ceil(height / scale)
        # Pillow holds 4 bytes a pixel of RGB beside ours, and ours twice while it is turned; what is converted takes more.
        factor = (10 if "exif" in image.info else 7) if image.mode == "RGB" else 18
        # A progressive JPEG's coefficients are all held at once, whatever the scale.
        coefficients = 6 * stored if image.info.get("progressive") else 0
        return Header(width=width, height=height, pixel_bytes=3 * pixels, decode_bytes=factor * pixels + coefficients)


def decode_map(data: bytes, *, pixel_cap: int = PIXEL_CAP) -> np.ndarray:
    """Decodes the label file in `data` to its raw values: (h, w) or (h, w, c), bool, integer or float.

    A `.npy` gives its array. A PNG or TIFF gives the numbers as stored: palette indices, 1-bit 0 and 1, 2- and 4-bit
    unscaled, 16-bit as uint16, float as float32, color in RGB order. Raises DecodeError as `decode` does.
    """
    if data.startswith(NPY_START):
        array = decode_npy(data)
    else:
        kind = _kind(data)
        if kind not in ("PNG", "TIFF"):
            raise DecodeError(f"a label file of {len(data)} bytes is {kind}; {_EXPECTED_MAP}")
        with _blaming(f"{kind} of {len(data)} bytes", _EXPECTED_MAP):
            image = _open(data, kind, pixel_cap)
            _check_whole(data, kind)
            array = _raw_values(image, data)
    if array.ndim not in (2, 3) or array.size == 0:
        raise DecodeError(f"a label file holds an array of shape {array.shape}; {_EXPECTED_MAP}")
    return array


def size_of(data: bytes, *, pixel_cap: int = PIXEL_CAP) -> tuple[int, int]:
    """Returns width and height of the photograph in `data` as it is seen, from its header alone.

    Raises DecodeError as `decode`.
    """
    kind = _kind(data)
    with _blaming(kind, _EXPECTED):
        image = _open(data, kind, pixel_cap)
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def as_plain(data: bytes) -> tuple[str, bytes]:
    """Returns the photograph in `data` as a file that any reader decodes to the pixels of `decode`, after its suffix.

    A JPEG or PNG in gray or RGB of 8 bits stays as it is, without text, if it is upright and needs neither a color profile
    nor a background; every other becomes a PNG. Raises DecodeError as `decode`.
    """
    pixels, kind = decode(data), _kind(data)
    if kind in ("JPEG", "PNG"):
        image = _open(data, kind, PIXEL_CAP)
        profile = image.info.get("icc_profile")
        is_deep = kind == "PNG" and _is_deep_color(image, data)
        is_srgb = not profile or _srgb_transform(bytes(profile)) is None
        is_plain = image.mode in ("RGB", "L") and not image.has_transparency_data and not is_deep
        if is_plain and is_srgb and _orientation(image) == 1:
            return "jpg" if kind == "JPEG" else "png", _READ[kind](data)
    return "png", encode_png(pixels)


def decode_npy(data: bytes) -> np.ndarray:
    """Returns the array in the `.npy` file `data`, of any shape; bool, integer or float, in this machine's byte order.

    Raises DecodeError if it is no such file, is truncated, or holds Python objects, complex numbers or records.
    """
    with _blaming(f".npy of {len(data)} bytes", "expected one array of bool, integer or float"):
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif":
            raise ValueError(f"it holds {getattr(array, 'dtype', type(array))}")
        return array.astype(array.dtype.newbyteorder("="), copy=False)


def encode_png(array: np.ndarray) -> bytes:
    """Encodes as PNG a uint8 or uint16 (h, w) map, or uint8 (h, w, 3) pixels in RGB order.

    Equal arrays give equal bytes (one OpenCV version). Raises ValueError on any other array.
    """
    is_map = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    is_color = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    if not (is_map or is_color) or array.size == 0:
        raise ValueError(f"no PNG of {array.dtype} {array.shape}: expected uint8 or uint16 (h, w), or uint8 (h, w, 3)")
    pixels = np.ascontiguousarray(array) if is_map else cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    # Both are named because OpenCV's defaults have changed between releases.
    options = [cv2.IMWRITE_PNG_COMPRESSION, 3, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    return cv2.imencode(".png", pixels, options)[1].tobytes()


def encode_npy(array: np.ndarray) -> bytes:
    """Encodes an array as a `.npy` file, C order, little endian. Raises ValueError on Python objects."""
    buffer = io.BytesIO()
    plain = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    np.lib.format.write_array(buffer, plain, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _kind(data: bytes) -> str:
    """Tells the kind of a picture by its first bytes. Raises DecodeError with what it is instead."""
    for kind, (starts, _) in _KINDS.items():
        if data.startswith(starts) and (kind != "WebP" or data[8:12] == b"WEBP"):
            return kind
    brands = containers.iso_brands(data)
    if not containers.AVIF_BRANDS.isdisjoint(brands):
        return "AVIF"
    if not containers.HEIC_BRANDS.isdisjoint(brands):
        return "HEIC"
    if not data:
        raise DecodeError(f"the file is empty; {_EXPECTED}")
    head = data[:512].lstrip().lower()
    found = next((kind for kind, starts in _OTHER_KINDS.items() if head.startswith(starts)), None)
    if found is None and data[4:8] == b"ftyp":
        found = f"an ISO media file ({data[8:12].decode('ascii', 'replace')}), such as MP4 or MOV"
    elif found is None and head.isascii() and b"\0" not in head:
        found = f"text ({data[:24]!r})"
    elif found is None:
        found = f"of an unknown kind (first bytes {data[:8].hex(' ')})"
    raise DecodeError(f"the {len(data)} bytes are {found}; {_EXPECTED}; convert the file or leave it out")


def _open(data: bytes, kind: str, pixel_cap: int) -> ImageFile.ImageFile:
    """Opens the file and judges its header; no pixel is decoded yet."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ConfigError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on in this process, so truncated photographs would pass as whole; "
            "a package you import set it: set it back to False after that import"
        )
    if kind == "HEIC":
        image = _heic_opener()(io.BytesIO(data))
    else:
        image = _KINDS[kind][1](io.BytesIO(_READ.get(kind, bytes)(data)))
    width, height = image.size
    if width * height > pixel_cap:
        raise DecodeError(
            f"{kind} of {width} x {height} = {width * height} pixels is over the cap of {pixel_cap}; "
            "make it smaller or leave it out"
        )
    return image


def _heic_opener() -> Callable[[io.BytesIO], ImageFile.ImageFile]:
    try:
        return import_module("pillow_heif").HeifImageFile
    except ImportError as error:
        raise DecodeError(
            "HEIC needs pillow-heif, which is missing here; pip install 'modmill[heif]', on each machine that decodes"
        ) from error


def _check_whole(data: bytes, kind: str) -> None:
    """Raises DecodeError if a check that the format offers fails which Pillow does not make."""
    wrong = None
    if kind == "PNG":
        wrong = containers.png_fault(data)
    elif kind == "JPEG" and not containers.has_jpeg_end(data):
        wrong = "it has no end mark (EOI), as if the rest was lost or overwritten"
    if wrong:
        raise DecodeError(f"{kind} of {len(data)} bytes is damaged or truncated: {wrong}; {_EXPECTED}")


def _scale(image: ImageFile.ImageFile, short: int | None) -> int:
    """Sets a JPEG to be decoded at 1/scale and returns the scale: 1 for all other files."""
    if short is None or not isinstance(image, JpegImageFile):
        return 1
    width, height = image.size
    scale = next((scale for scale in (8, 4, 2) if -(-min(width, height) // scale) >= short), 1)
    if scale > 1:
        image.draft(image.mode, (width // scale, height // scale))
    return scale


def _pixels(image: Image.Image) -> np.ndarray:
    """Returns an RGB image as uint8 (h, w, 3).

    Reads Pillow's own memory, 4 bytes a pixel, in place: a quarter of the time of a copy by way of bytes. That works only
    if the image lies in one block of memory, so larger images go strip by strip.
    """
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    step = max(1, _ONE_BLOCK_BYTES // (4 * width))
    for top in range(0, height, step):
        bottom = min(top + step, height)
        strip = image if step >= height else image.crop((0, top, width, bottom))
        packed = pa.array(strip).flatten().to_numpy(zero_copy_only=True)
        cv2.cvtColor(packed.reshape(bottom - top, width, 4), cv2.COLOR_RGBA2RGB, dst=pixels[top:bottom])
    return pixels


@contextmanager
def _blaming(what: str, expected: str) -> Iterator[None]:
    """Turns any exception within into a DecodeError: the parsers answer damaged bytes with a dozen kinds of exception."""
    try:
        yield
    except (DecodeError, ConfigError):
        raise
    except Exception as error:
        raise DecodeError(f"{what} is damaged or of an unsupported sort: {error!r}; {expected}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Returns `image` in mode RGB: scaled to 8 bits, color managed, composited on white."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        bits = image.tag_v2.get(BITSPERSAMPLE) if isinstance(image, TiffImageFile) else None
        image = Image.fromarray(_to_8_bits(np.asarray(image), 4095.0 if bits == (12,) else None))
    alpha, color = None, image
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        alpha = transparent.getchannel("A")
        color = image.convert("L") if image.mode == "LA" else transparent.convert("RGB")
    elif image.mode not in ("RGB", "L", "CMYK"):
        color = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        color = _to_srgb(color, bytes(profile))
    if color.mode != "RGB":
        color = color.convert("RGB")
    if alpha is None:
        return color
    page = Image.new("RGB", color.size, "white")
    page.paste(color, mask=alpha)
    return page


def _to_8_bits(values: np.ndarray, white: float | None) -> np.ndarray:
    """Scales (h, w) uint16, int32 or float32 to uint8, as `decode` states; `white` is None if the file does not say it."""
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        _check_not_black(values, white or 65535.0)
        return (values >> (4 if white == 4095.0 else 8)).astype(np.uint8)
    numbers = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if numbers.max() <= 0 and values.any():
        raise DecodeError("none of its numbers is above 0 and finite; scale them to 0..1 or 0..255")
    above = (1 - _SHARE) * numbers.size
    white = white or next((white for white in _WHITES if np.count_nonzero(numbers > white) <= above), None)
    if white is None:
        raise DecodeError(
            f"more than 1 % of its numbers are above {_WHITES[-1]:.0f}, and nothing says which of them is white; "
            "scale them to 0..1 or 0..255"
        )
    _check_not_black(numbers, white)
    return np.rint(numbers.clip(0, white) * (255 / white)).astype(np.uint8)


def _check_not_black(values: np.ndarray, white: float) -> None:
    """Raises DecodeError if numbers that may well be a picture would come out black on the scale from 0 to `white`."""
    if white < 65535.0 or np.count_nonzero(values >= white * _BLACK) > (1 - _SHARE) * values.size or values.max() <= 0:
        return
    raise DecodeError(
        f"99 % of its numbers are under {math.ceil(white * _BLACK)} (the largest is {values.max():g}), so it would come out "
        f"black on a scale of 0 to {white:.0f}; scale them to all of it, or to 0..1 or 0..255 as floats"
    )


def _check_deep_color(image: ImageFile.ImageFile, data: bytes) -> None:
    """Raises DecodeError if color of 16 bits would come out black. Pillow has only the high bytes."""
    if image.mode not in ("RGB", "RGBA"):
        return
    high = np.asarray(image)[..., :3]
    if np.count_nonzero(high >= 256 * _BLACK) <= (1 - _SHARE) * high.size:
        _check_not_black(_deep_color(data)[..., :3], 65535.0)


def _to_srgb(color: Image.Image, profile: bytes) -> Image.Image:
    found = _srgb_transform(profile)
    if found is None:
        return color
    mode, transform = found
    if mode == "RGB" and color.mode == "L":
        color = color.convert("RGB")
    # A profile for other channels than the pixels have is a mistake of the writer.
    return transform.apply(color) if color.mode == mode else color


@lru_cache(maxsize=32)
def _srgb_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """Returns the mode that an ICC profile is for and its transform to sRGB.

    Returns None for a broken profile, and for one that moves no color by more than one code value. Most profiles are such
    (they are sRGB), so this saves time and rounding. LittleCMS transforms may be shared by threads.
    """
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space]
        srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.PERCEPTUAL
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB", intent)
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
        return None
    if mode == "RGB":
        steps = np.linspace(0, 255, 9).astype(np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
        moved = np.asarray(transform.apply(Image.fromarray(grid)))
        if np.abs(moved.astype(int) - grid).max() <= 1:
            return None
    return mode, transform


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 if it is missing or the EXIF block is broken (the pixels are whole)."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the parser answers a broken block with a dozen kinds of exception
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns pixels (h, w, 3) as the orientation says (EXIF 2.3, tag 0x0112)."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _raw_values(image: ImageFile.ImageFile, data: bytes) -> np.ndarray:
    """Returns the numbers of a PNG or TIFF as stored."""
    image.load()
    if _is_deep_color(image, data):
        return _deep_color(data)
    array = np.asarray(image)
    if image.mode == "1":
        return array.astype(np.uint8)
    if image.format == "PNG" and image.mode == "L" and data[24] in (2, 4):
        # Pillow scales gray of 2 and 4 bits to 0..255.
        return array // (255 // (2 ** data[24] - 1))
    return array.astype(array.dtype.newbyteorder("="))


def _deep_color(data: bytes) -> np.ndarray:
    """Returns color of 16 bits, of which Pillow (which has checked that the file is whole) keeps only the high byte."""
    found: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return cv2.cvtColor(found, cv2.COLOR_BGR2RGB if found.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)


def _is_deep_color(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Tells whether pixels have several channels of more than 8 bits."""
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(BITSPERSAMPLE, (1,))
        return len(bits) > 1 and max(bits) > 8
    return data[24] == 16 and data[25] != 0  # bit depth and color type of PNG's IHDR, which comes first
