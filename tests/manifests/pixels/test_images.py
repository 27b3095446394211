import io
import random
import resource
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageCms, ImageFile, ImageOps

from manifests.errors import ConfigError, DecodeError
from manifests.pixels import images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 31, 3), dtype=np.uint8)
ORIENTATION = 0x0112


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bit_depth: int, color_type: int, rows: list[bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    compressor = zlib.compressobj(9)
    body = b"".join(compressor.compress(b"\0" + row) for row in rows) + compressor.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


# ICC profiles, version 2.4, as the specification lays them out.


def icc(device_class: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    d50 = struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1.0, 0.8249)))
    white = b"XYZ \0\0\0\0" + d50
    table, body = b"", b""
    start = 128 + 4 + 12 * (len(tags) + 1)
    for name, data in {**tags, b"wtpt": white}.items():
        padded = data + b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += padded
    size = start + len(body)
    header = struct.pack(">I4sI4s4s4s12s4s", size, b"lcms", 0x02400000, device_class, space, connection, b"", b"acsp")
    header = (header + b"\0" * 28 + d50).ljust(128, b"\0")
    return header + struct.pack(">I", len(tags) + 1) + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


LINEAR = b"curv\0\0\0\0" + struct.pack(">I", 0)
GAMMA = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256))
RED, GREEN, BLUE = (
    (0.4360747, 0.2225045, 0.0139322),
    (0.3850649, 0.7168786, 0.0971045),
    (0.1430804, 0.0606169, 0.7141733),
)
LINEAR_GRAY = icc(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": LINEAR})
# sRGB's primaries with red and green exchanged: a converted picture shows it at once.
EXCHANGED = icc(
    b"mntr",
    b"RGB ",
    b"XYZ ",
    {b"rXYZ": xyz(*GREEN), b"gXYZ": xyz(*RED), b"bXYZ": xyz(*BLUE), b"rTRC": GAMMA, b"gTRC": GAMMA, b"bTRC": GAMMA},
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def black_only_cmyk() -> bytes:
    """A press that prints black only: white paper unless K is full."""
    identity = struct.pack(">9i", *(65536 * (place % 4 == 0) for place in range(9)))
    ramp = bytes(range(256))
    corners = b"".join(bytes([0 if corner & 1 else 255, 128, 128]) for corner in range(16))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + corners + ramp * 3
    return icc(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_files_give_their_pixels(kind, options):
    decoded = images.decode(saved(Image.fromarray(PIXELS), kind, **options))
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable
    np.testing.assert_array_equal(decoded, PIXELS)


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {"quality": 95}), ("JPEG", {"progressive": True}), ("WEBP", {})]
)
def test_lossy_files_are_near(kind, options):
    photo = skimage.data.astronaut()[:200, :220]
    decoded = images.decode(saved(Image.fromarray(photo), kind, **options))
    assert decoded.shape == photo.shape
    assert np.abs(decoded.astype(int) - photo).mean() < 6


def test_the_name_of_the_file_does_not_matter_only_its_bytes():
    assert images.decode(saved(Image.fromarray(PIXELS), "PNG")).shape == (24, 31, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(kind, orientation):
    # Blocks of 16 px survive JPEG where it keeps all of the color.
    photo = Image.fromarray(RNG.integers(0, 256, (2, 3, 3), dtype=np.uint8)).resize((48, 32), Image.Resampling.NEAREST)
    exif = photo.getexif()
    exif[ORIENTATION] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = saved(photo, kind, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(photo))
    decoded = images.decode(data)
    assert decoded.shape == expected.shape == ((48, 32, 3) if orientation >= 5 else (32, 48, 3))
    assert np.abs(decoded.astype(int) - expected).max() <= (3 if kind == "JPEG" else 0)


def test_orientation_6_puts_the_left_column_on_top():
    photo = Image.new("RGB", (20, 10), "blue")
    photo.paste("red", (0, 0, 2, 10))
    exif = photo.getexif()
    exif[ORIENTATION] = 6
    decoded = images.decode(saved(photo, "PNG", exif=exif))
    assert decoded.shape == (20, 10, 3)
    assert (decoded[:2] == [255, 0, 0]).all()


def test_a_broken_exif_block_spoils_no_pixels():
    data = saved(Image.fromarray(PIXELS), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(images.decode(data), PIXELS)


def test_gray_of_16_bits_is_scaled_not_clipped():
    values = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    expected = np.array([[0, 0, 1, 156, 255]], np.uint8)
    for data in (saved(Image.fromarray(values), "PNG"), saved(Image.fromarray(values), "TIFF")):
        np.testing.assert_array_equal(images.decode(data), np.repeat(expected[..., None], 3, axis=2))
    big_endian = saved(Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes()), "TIFF")
    np.testing.assert_array_equal(images.decode(big_endian)[..., 0], expected)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_color_of_16_bits_keeps_the_high_byte_as_gray_does(suffix):
    values = RNG.integers(0, 65536, (9, 7, 3), dtype=np.uint16)
    data = cv2.imencode(suffix, values)[1].tobytes()
    np.testing.assert_array_equal(images.decode(data), (values[..., ::-1] >> 8).astype(np.uint8))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.0, 0.5, 1.0]], [0, 128, 255]),
        ([[0.0, 100.0, 255.0]], [0, 100, 255]),
        ([[0.0, 25700.0, 65535.0]], [0, 100, 255]),
        ([[-5.0, np.nan, 1.0]], [0, 0, 255]),
        ([[-5.0, np.inf, 1.0]], [0, 0, 255]),
    ],
)
def test_floats_are_scaled_by_the_full_scale_that_holds_them(values, expected):
    data = saved(Image.fromarray(np.array(values, np.float32)), "TIFF")
    assert images.decode(data)[0, :, 0].tolist() == expected


def test_integers_of_32_bits_are_scaled():
    data = saved(Image.fromarray(np.array([[0, 25700, 65535]], np.int32)), "TIFF")
    assert images.decode(data)[0, :, 1].tolist() == [0, 100, 255]


def ramp(top: float, dtype: type) -> np.ndarray:
    return np.linspace(0, top, 4096).reshape(64, 64).astype(dtype)


@pytest.mark.parametrize(
    ("top", "over", "dtype"), [(1, 1.0001, np.float32), (255, 256, np.int32), (65535, 1e9, np.float32)]
)
def test_a_range_does_not_hang_on_one_pixel(top, over, dtype):
    values = ramp(top, dtype)
    expected = images.decode(saved(Image.fromarray(values), "TIFF"))
    values[10, 10] = over
    decoded = images.decode(saved(Image.fromarray(values), "TIFF"))
    assert 126 < decoded.mean() < 129
    assert (decoded[10, 10] == 255).all()
    decoded[10, 10] = expected[10, 10]
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize(
    "values",
    [ramp(4095, np.uint16), ramp(255, np.uint16), ramp(4095, np.int32), ramp(4095, np.float32), ramp(70_000, np.int32)],
)
def test_what_would_come_out_black_fails(values):
    kinds = ["TIFF", "PNG"] if values.dtype == np.uint16 else ["TIFF"]
    for kind in kinds:
        with pytest.raises(
            DecodeError, match=r"99 % of its numbers are under \d+ \(the largest is .*black on a scale of 0 to"
        ):
            images.decode(saved(Image.fromarray(values), kind))


@pytest.mark.parametrize("values", [[[-3.0, -2.0, -1.0]], [[np.nan] * 3], [[1e12, 2e12, 3e12]]])
def test_numbers_without_a_scale_fail(values):
    with pytest.raises(DecodeError, match=r"scale them to 0\.\.1"):
        images.decode(saved(Image.fromarray(np.array(values, np.float32)), "TIFF"))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_color_of_12_bits_in_16_fails_and_black_stays_black(suffix):
    with pytest.raises(DecodeError, match=r"the largest is 4095\).*black"):
        images.decode(cv2.imencode(suffix, np.stack([ramp(4095, np.uint16)] * 3, axis=2))[1].tobytes())
    for shape in ((8, 8, 3), (8, 8)):
        black = cv2.imencode(suffix, np.zeros(shape, np.uint16))[1].tobytes()
        assert not images.decode(black).any()


def test_a_tiff_of_12_bits_has_a_scale_of_its_own():
    # Two numbers of 12 bits in three bytes: 0x000 0xfff, 0x800 0x7ff.
    pixels = bytes([0x00, 0x0F, 0xFF, 0x80, 0x07, 0xFF])
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 6}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = struct.pack("<2sHI", b"II", 42, 14) + pixels + struct.pack("<H", len(tags)) + fields + bytes(4)
    assert images.decode(data)[0, :, 0].tolist() == [0, 255, 128, 127]


def test_two_colors_and_gray():
    mask = np.array([[True, False, True]])
    assert images.decode(saved(Image.fromarray(mask), "PNG"))[0, :, 2].tolist() == [255, 0, 255]
    gray = np.array([[0, 77, 255]], np.uint8)
    assert images.decode(saved(Image.fromarray(gray), "BMP"))[0, :, 1].tolist() == [0, 77, 255]


def test_transparency_is_composited_on_white():
    color = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], np.uint8)
    decoded = images.decode(saved(Image.fromarray(color), "PNG"))
    assert decoded[0].tolist() == [[200, 0, 0], [255, 255, 255], [244, 204, 204]]
    gray = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    assert images.decode(saved(gray, "PNG"))[0].tolist() == [[10, 10, 10], [255, 255, 255]]


def test_palette_with_transparency():
    picture = Image.new("P", (3, 1))
    picture.putpalette([10, 20, 30, 200, 100, 0, 5, 5, 5])
    picture.putdata([0, 1, 2])
    assert images.decode(saved(picture, "PNG"))[0].tolist() == [[10, 20, 30], [200, 100, 0], [5, 5, 5]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        see_through = images.decode(saved(picture, "PNG", transparency=bytes([255, 0, 51])))
    assert see_through[0].tolist() == [[10, 20, 30], [255, 255, 255], [205, 205, 205]]


def test_a_color_key_is_transparent():
    data = saved(Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8)), "PNG", transparency=(1, 2, 3))
    assert images.decode(data)[0].tolist() == [[255, 255, 255], [9, 9, 9]]


def test_an_animation_gives_its_first_frame():
    red, green = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "lime")
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        decoded = images.decode(saved(red, kind, save_all=True, append_images=[green, red], **options))
        assert decoded.shape == (6, 8, 3)
        assert (decoded == [255, 0, 0]).all(), kind


def test_cmyk_without_a_profile():
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [100, 0, 255, 50]]], np.uint8)
    expected = [[255, 255, 255], [0, 255, 255], [0, 0, 0], [125, 205, 0]]
    assert images.decode(saved(Image.fromarray(ink, "CMYK"), "TIFF"))[0].tolist() == expected


def test_cmyk_jpeg_of_adobe_is_not_inverted():
    # Pillow writes CMYK JPEGs with Adobe's marker, inverted as Photoshop does.
    white = saved(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG")
    assert b"Adobe" in white
    assert (images.decode(white) == 255).all()


def test_cmyk_goes_through_its_profile():
    cyan = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    assert (images.decode(saved(cyan, "TIFF", icc_profile=black_only_cmyk())) >= 254).all()
    black = Image.new("CMYK", (4, 4), (0, 0, 0, 255))
    assert (images.decode(saved(black, "TIFF", icc_profile=black_only_cmyk())) <= 1).all()


def test_rgb_goes_through_its_profile():
    red = Image.new("RGB", (4, 4), "red")
    for kind in ("PNG", "TIFF"):
        assert np.abs(images.decode(saved(red, kind, icc_profile=EXCHANGED)).astype(int) - [0, 255, 0]).max() <= 2
    see_through = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (images.decode(saved(see_through, "PNG", icc_profile=EXCHANGED)) == 255).all()


def test_gray_goes_through_its_profile():
    gray = Image.new("L", (4, 4), 55)
    expected = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)  # the sRGB curve of a linear 55
    assert np.abs(images.decode(saved(gray, "PNG", icc_profile=LINEAR_GRAY)) - expected).max() <= 1.5


@pytest.mark.parametrize("profile", [SRGB, b"no profile", EXCHANGED[:200], LINEAR_GRAY, black_only_cmyk()])
def test_a_profile_that_is_srgb_or_broken_or_for_other_channels_changes_nothing(profile):
    np.testing.assert_array_equal(images.decode(saved(Image.fromarray(PIXELS), "PNG", icc_profile=profile)), PIXELS)


ENDINGS = [
    ("JPEG", {}, 1),
    ("JPEG", {"progressive": True}, 1),
    ("PNG", {}, 1),
    ("WEBP", {}, 1),
    ("TIFF", {}, 1),
    ("TIFF", {"compression": "tiff_lzw"}, 1),
    ("BMP", {}, 1),
    # What stands behind the first frame is not needed.
    ("GIF", {}, 4),
]


@pytest.mark.parametrize(("kind", "options", "end"), ENDINGS)
def test_a_truncated_file_fails(kind, options, end):
    data = saved(Image.fromarray(skimage.data.astronaut()[:64, :64]), kind, **options)
    assert images.decode(data).shape == (64, 64, 3)
    for length in (len(data) - end, len(data) * 3 // 4, len(data) // 2, 60, 12):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(DecodeError, match=r"expected one whole JPEG, PNG, WebP, TIFF, GIF, BMP"):
                images.decode(data[:length])


def test_a_png_fails_by_its_checksums():
    data = bytearray(saved(Image.fromarray(PIXELS), "PNG", icc_profile=SRGB))
    data[data.index(b"IDAT") + 4 + 60] ^= 255
    with pytest.raises(DecodeError, match="checksum of IDAT is wrong"):
        images.decode(bytes(data))
    with pytest.raises(DecodeError, match="checksum of IDAT is wrong"):
        images.decode_map(bytes(data))
    # Not one bit of what pixels depend on may turn unseen.
    rotten = bytearray(saved(Image.fromarray(PIXELS[:6, :6]), "PNG"))
    for place in range(8, len(rotten)):
        rotten[place] ^= 4
        with pytest.raises(DecodeError):
            images.decode(bytes(rotten))
        rotten[place] ^= 4


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
def test_a_jpeg_with_a_tail_of_zeros_fails_and_one_with_something_behind_its_end_does_not(options):
    data = saved(Image.fromarray(RNG.integers(0, 256, (90, 90, 3), np.uint8)), "JPEG", **options)
    for behind in (b"", b"\0" * 5000, b"a phone's trailer"):
        assert images.decode(data + behind).shape == (90, 90, 3)
    for part in (0.3, 0.5, 0.9, 0.999):
        cut = int(len(data) * part)
        with pytest.raises(DecodeError, match="no end mark"):
            images.decode(data[:cut] + b"\0" * (len(data) - cut))


def png_with(*chunks: bytes, behind: bool = False) -> bytes:
    """A PNG of PIXELS with more chunks before its pixels, or behind them."""
    data = saved(Image.fromarray(PIXELS), "PNG")
    place = data.index(b"IEND" if behind else b"IDAT") - 4
    return data[:place] + b"".join(chunks) + data[place:]


XMP = b"XML:com.adobe.xmp\0"
TEXT = b"A" * 20_000_000
NOT_NEEDED = {
    "text": chunk(b"tEXt", b"prompt\0" + b"a cat " * 300_000),
    "bomb": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(TEXT)),
    "international": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(TEXT)),
    "xmp": chunk(b"iTXt", XMP + b"\1\0\0\0" + zlib.compress(TEXT)),
    "exif of a bomb": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(TEXT)),
    "profile": chunk(b"iCCP", b"a\0\0" + zlib.compress(TEXT)),
    "method": chunk(b"zTXt", b"a\0\7nonsense"),
    "rotten": chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0",
    "gamma": chunk(b"gAMA", b"\1"),
    "animation": chunk(b"acTL", b"\0"),
    "name of a pixel's fact": chunk(b"tEXt", b"transparency\0red"),
    "unknown": chunk(b"abCd", b"nonsense"),
}


@pytest.mark.parametrize("name", NOT_NEEDED)
@pytest.mark.parametrize("behind", [False, True])
def test_metadata_that_decides_no_pixel_is_neither_read_nor_a_fault(name, behind):
    data = png_with(NOT_NEEDED[name], behind=behind)
    start = time.process_time()
    np.testing.assert_array_equal(images.decode(data), PIXELS)
    np.testing.assert_array_equal(images.decode_map(data), PIXELS)
    assert images.size_of(data) == (31, 24)
    assert time.process_time() - start < 2


def test_hundreds_of_bombs_take_no_longer_than_a_few():
    bomb = chunk(b"zTXt", b"exif\0\0" + zlib.compress(b"A" * 1_000_000))
    start = time.process_time()
    np.testing.assert_array_equal(images.decode(png_with(bomb * 3000)), PIXELS)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("behind", [False, True])
def test_text_that_says_what_is_up_is_read(behind):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    raw = b"\nexif\n      50\n" + exif.tobytes().hex().encode()
    xmp = b'<x tiff:Orientation="6"/>'
    for name, body in [
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        (b"tEXt", b"Raw profile type exif\0" + raw),
        (b"iTXt", XMP + b"\0\0\0\0" + xmp),
        (b"iTXt", XMP + b"\1\0en\0\0" + zlib.compress(xmp)),
        (b"eXIf", exif.tobytes()[6:]),
    ]:
        np.testing.assert_array_equal(images.decode(png_with(chunk(name, body), behind=behind)), np.rot90(PIXELS, -1))


@pytest.mark.parametrize(
    "segment",
    [
        b"\xff\xe0\0\x06JFIF",
        b"\xff\xe1\0\x0fExif\0\0garbage",
        b"\xff\xe1\0\x22http://ns.adobe.com/xap/1.0/\0\xff\xfe<",
        b"\xff\xe2\0\x0eICC_PROFILE\0",
        b"\xff\xe2\0\x10ICC_PROFILE\0\1\3",
        b"\xff\xe2\0\x0dMPF\0garbage",
        b"\xff\xed\0\x1aPhotoshop 3.0\x008BIM\3\xed\xff\xff",
        b"\xff\xee\0\x07Adobe",
        b"\xff\xfe\0\x04\xff\xff",
    ],
)
def test_metadata_that_is_broken_fails_no_jpeg(segment):
    data = saved(Image.fromarray(PIXELS), "JPEG")
    broken = data[:2] + segment + data[2:]
    np.testing.assert_array_equal(images.decode(broken), images.decode(data))
    assert images.size_of(broken) == (31, 24)


def test_a_large_profile_is_applied():
    body = zlib.compress(EXCHANGED + bytes(2_000_000))
    assert (images.decode(png_with(chunk(b"iCCP", b"large\0\0" + body))) != PIXELS).any()


def test_truncated_files_are_refused_where_another_package_lets_them_pass(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ConfigError, match="LOAD_TRUNCATED_IMAGES"):
        images.decode(saved(Image.fromarray(PIXELS), "JPEG"))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "empty"),
        (b"just a note, no photograph", "text \\(b'just a note"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"  \n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "ISO media file \\(isom\\)"),
        (b"\x01\x02\x03\x04\xff", "unknown kind"),
        (b"RIFF\0\0\0\0WAVEfmt ", "unknown kind"),
        (b"BM, a text that begins like a bitmap", "BMP"),
        (b"\xff\xd8\xff", "JPEG"),
    ],
)
def test_what_is_no_image_is_named(data, found):
    with pytest.raises(DecodeError, match=found):
        images.decode(data)


def test_avif_is_read_whole_upright_and_by_its_profile():
    photo = skimage.data.astronaut()[:90, :120]
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = saved(Image.fromarray(photo), "AVIF", quality=95, speed=10, exif=exif)
    decoded = images.decode(data)
    assert decoded.shape == (120, 90, 3)
    assert np.abs(decoded.astype(int) - np.rot90(photo, -1)).mean() < 6
    assert images.size_of(data) == (90, 120)
    assert images.header_of(data).pixel_bytes == photo.size
    with pytest.raises(DecodeError, match="over the cap"):
        images.size_of(data, pixel_cap=100)
    for length in (len(data) - 200, len(data) // 2, 40):
        with pytest.raises(DecodeError):
            images.decode(data[:length])


def test_heic_without_its_package_says_how_to_read_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for brands in (b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic"):
        with pytest.raises(DecodeError, match=r"pip install 'modmill\[heif\]'"):
            images.decode(b"\0\0\0\x18ftyp" + brands + bytes(99))


def test_heic_is_read_upright():
    pillow_heif = pytest.importorskip("pillow_heif")
    photo = skimage.data.astronaut()[:90, :120]
    image = Image.fromarray(photo)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=90, exif=exif.tobytes())
    decoded = images.decode(buffer.getvalue())
    assert decoded.shape == (120, 90, 3)
    assert np.abs(decoded.astype(int) - np.rot90(photo, -1)).mean() < 8
    assert images.size_of(buffer.getvalue()) == (90, 120)


@pytest.fixture(scope="module")
def bomb() -> bytes:
    return png(30_000, 30_000, 1, 0, [b"\0" * 3750] * 30_000)


def test_a_bomb_is_judged_by_its_header(bomb):
    assert len(bomb) < 200_000
    code = (
        "import resource, sys, time\n"
        "from manifests.pixels import images\n"
        "from manifests.errors import DecodeError\n"
        "data = sys.stdin.buffer.read()\n"
        "before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()\n"
        "try:\n"
        "    images.decode(data)\n"
        "except DecodeError as error:\n"
        "    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.perf_counter() - start)\n"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], input=bomb, capture_output=True, check=True)
    message, cost = ran.stdout.decode().splitlines()
    assert "30000 x 30000 = 900000000 pixels is over the cap of 128000000" in message
    memory_kib, time_s = (float(value) for value in cost.split())
    assert memory_kib < 20_000
    assert time_s < 1
    assert ran.stderr == b""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_the_cap_holds_for_every_kind(kind):
    data = saved(Image.fromarray(PIXELS), kind)
    assert images.decode(data, pixel_cap=24 * 31).shape == (24, 31, 3)
    with pytest.raises(DecodeError, match="31 x 24 = 744 pixels is over the cap of 743"):
        images.decode(data, pixel_cap=24 * 31 - 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_the_size_is_read_from_the_header(kind):
    data = saved(Image.fromarray(PIXELS), kind)
    assert images.size_of(data) == (31, 24)
    with pytest.raises(DecodeError, match="over the cap of 743"):
        images.size_of(data, pixel_cap=743)


def test_headers_that_lie_cost_nothing():
    """Sizes patched into the headers of small files, with no pixels behind them."""
    gif = bytearray(saved(Image.new("L", (16, 16)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    frame = bytearray(saved(Image.new("L", (16, 16)), "GIF"))
    place = frame.index(b",")
    frame[place + 5 : place + 9] = struct.pack("<HH", 65535, 65535)
    webp = bytearray(saved(Image.new("RGB", (16, 16)), "WEBP", lossless=True))
    place = webp.index(b"VP8L") + 9
    webp[place : place + 4] = struct.pack("<I", 11_999 | 11_999 << 14)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for data in (gif, frame, webp):
        with pytest.raises(DecodeError, match=r"pixels"):
            images.decode(bytes(data))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert time.perf_counter() - start < 1


def test_a_photograph_between_pillows_limit_and_ours_does_not_warn():
    # 100 Mpx: over Pillow's own limit for a warning. TIFF checks it once more while loading.
    data = saved(Image.new("1", (10_000, 10_000)), "TIFF", compression="group4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = images._open(data, "TIFF", images.PIXEL_CAP)
        image.load()
    assert image.size == (10_000, 10_000)


@pytest.mark.parametrize("seed", range(4))
def test_mutilated_files_give_pixels_or_a_decode_error(seed):
    draw = random.Random(seed)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo = Image.fromarray(PIXELS)
    files = [
        saved(photo, "JPEG", exif=exif, icc_profile=SRGB),
        saved(photo.convert("CMYK"), "JPEG"),
        saved(photo, "PNG", exif=exif, icc_profile=SRGB),
        saved(photo.convert("P"), "PNG", transparency=3),
        saved(photo, "WEBP", exif=exif),
        saved(photo, "TIFF"),
        saved(photo.convert("P"), "GIF"),
        saved(photo.convert("1"), "BMP"),
        images.encode_npy(PIXELS),
    ]
    outcomes = set()
    for _ in range(250):
        data = bytearray(draw.choice(files))
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        for function in (images.decode, images.decode_map):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    found = function(bytes(data), pixel_cap=1_000_000)
                    outcomes.add(found.dtype.kind)
                except DecodeError as error:
                    outcomes.add(type(error.__cause__).__name__)
    assert "u" in outcomes
    assert "OSError" in outcomes


def test_threads_decode_alike():
    data = [
        saved(Image.fromarray(RNG.integers(0, 256, (50, 40, 3), dtype=np.uint8)), kind, icc_profile=EXCHANGED)
        for kind in ("JPEG", "PNG", "TIFF", "WEBP")
    ]
    alone = [images.decode(file) for file in data]
    barrier = threading.Barrier(4)
    images._srgb_transform.cache_clear()

    def work(_: int) -> list[np.ndarray]:
        barrier.wait()
        return [images.decode(file) for file in data * 5]

    with ThreadPoolExecutor(4) as pool:
        for decoded in pool.map(work, range(4)):
            for place, pixels in enumerate(decoded):
                np.testing.assert_array_equal(pixels, alone[place % 4])


def test_a_map_keeps_palette_indices():
    index = RNG.integers(0, 134, (9, 7), dtype=np.uint8)
    picture = Image.fromarray(index, "P")
    picture.putpalette(RNG.integers(0, 256, 768).tolist())
    for kind in ("PNG", "TIFF"):
        found = images.decode_map(saved(picture, kind))
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, index)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_a_tiff_keeps_its_numbers(dtype):
    values = (RNG.random((5, 6)) * 250).astype(dtype)
    found = images.decode_map(saved(Image.fromarray(values), "TIFF"))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)


def test_a_map_of_16_bit_color_keeps_both_bytes_in_rgb_order():
    values = RNG.integers(0, 65536, (9, 7, 3), dtype=np.uint16)
    for suffix in (".png", ".tiff"):
        found = images.decode_map(cv2.imencode(suffix, values[..., ::-1])[1].tobytes())
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, values)


def test_a_map_of_few_bits_keeps_its_numbers():
    assert images.decode_map(png(4, 1, 2, 0, [bytes([0b00011011])])).tolist() == [[0, 1, 2, 3]]
    assert images.decode_map(png(2, 1, 4, 0, [bytes([0x7F])])).tolist() == [[7, 15]]
    assert images.decode_map(png(8, 1, 1, 0, [bytes([0b10100000])])).tolist() == [[1, 0, 1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "empty"),
        (saved(Image.fromarray(PIXELS), "JPEG"), "is JPEG"),
        (images.encode_npy(PIXELS)[:-1], "damaged"),
        (images.encode_npy(np.zeros(5)), r"shape \(5,\)"),
        (images.encode_npy(np.zeros((0, 5))), r"shape \(0, 5\)"),
        (images.encode_npy(np.zeros((2, 2), complex)), "complex128"),
        (saved(Image.fromarray(PIXELS), "PNG")[:-60], "PNG"),
    ],
)
def test_what_is_no_map_is_named(data, found):
    with pytest.raises(DecodeError, match=found):
        images.decode_map(data)


def test_pickled_arrays_are_not_opened():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DecodeError, match="pickle"):
        images.decode_map(buffer.getvalue())


def test_an_array_that_claims_a_terabyte_is_refused():
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (400000, 400000), }".ljust(117) + "\n"
    with pytest.raises(DecodeError):
        images.decode_map(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())


SIDES = st.integers(1, 40)
MAPS = st.sampled_from([np.uint8, np.uint16]).flatmap(
    lambda dtype: st.one_of(
        hnp.arrays(dtype, st.tuples(SIDES, SIDES)),
        hnp.arrays(np.uint8, st.tuples(SIDES, SIDES, st.just(3))),
    )
)


@settings(max_examples=60, deadline=None)
@given(MAPS)
def test_png_round_trip(array):
    data = images.encode_png(array)
    assert images.encode_png(array.copy(order="F")) == data
    back = images.decode_map(data)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(st.sampled_from([">f4", "<f8", "u1", ">i2", "?"]), hnp.array_shapes(min_dims=0, max_dims=4)))
def test_npy_round_trip(array):
    data = images.encode_npy(array)
    assert images.encode_npy(array.copy(order="F")) == data
    back = images.decode_npy(data)
    assert back.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8), np.zeros((0, 2), np.uint8)])
def test_arrays_that_are_no_png_are_refused(array):
    with pytest.raises(ValueError, match="expected uint8 or uint16"):
        images.encode_png(array)


def test_objects_are_no_npy():
    with pytest.raises(ValueError, match="Object arrays"):
        images.encode_npy(np.array([{}], dtype=object))


def plain_cases() -> dict[str, tuple[bytes, str, bool]]:
    """A file, the suffix that it is to have, and whether it stays as it is."""
    photo = Image.fromarray(PIXELS)
    exif = photo.getexif()
    exif[ORIENTATION] = 6
    deep = RNG.integers(0, 65536, (9, 8, 3), dtype=np.uint16)
    return {
        "jpeg": (saved(photo, "JPEG"), "jpg", True),
        "gray": (saved(photo.convert("L"), "JPEG"), "jpg", True),
        "png": (saved(photo, "PNG"), "png", True),
        "srgb": (saved(photo, "JPEG", icc_profile=SRGB), "jpg", True),
        "turned": (saved(photo, "JPEG", exif=exif), "png", False),
        "exchanged": (saved(photo, "JPEG", icc_profile=EXCHANGED), "png", False),
        "cmyk": (saved(photo.convert("CMYK"), "JPEG"), "png", False),
        "transparent": (saved(photo.convert("RGBA"), "PNG"), "png", False),
        "deep": (cv2.imencode(".png", deep)[1].tobytes(), "png", False),
        "webp": (saved(photo, "WEBP"), "png", False),
        "bmp": (saved(photo, "BMP"), "png", False),
    }


@pytest.mark.parametrize("name", plain_cases())
def test_a_plain_file_is_one_that_any_reader_decodes_alike(name):
    data, expected, stays = plain_cases()[name]
    suffix, plain = images.as_plain(data)
    assert (suffix, plain == data) == (expected, stays)
    read = np.asarray(Image.open(io.BytesIO(plain)).convert("RGB"))
    np.testing.assert_array_equal(read, images.decode(data))
