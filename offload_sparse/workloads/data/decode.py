"""From the bytes of a file to 8-bit pixels, whatever the file says it holds.

Read are the usual formats of photographs and drawings; no other decoder of the library is ever started, so a
file cannot reach Ghostscript. Deeper images are scaled to 8 bits where their range is known and refused where
it is not; photographs are turned as their EXIF orientation says; transparency is laid over white; of an
animation the first frame counts.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

try:
    from simplejpeg import decode_jpeg
except ImportError:  # not built for every platform; Pillow then decodes all
    decode_jpeg = None

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read; MPO, which cameras write, is a JPEG with more images behind it."""

GREY_MODES = ("1", "L", "LA")
MOST_PIXELS = 1 << 26
"""An image above this is refused before it is decoded (Pillow's own bound for bombs is 2.7 times as much)."""

_MOST_BYTES = 1 << 30
_PIL_MODES = {1: "L", 3: "RGB"}
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF

Stored: TypeAlias = dict[str, Any] | None
"""A stored image: its ``bytes``, or the ``path`` (text, or bytes as the file system has them) of its file."""

_FRAMES = (0xC0, 0xC1, 0xC2)  # markers of JPEG: baseline, extended and progressive frames, EXIF data or XMP
_METADATA = 0xE1


class UndecodableError(ValueError):
    """An image cannot be decoded; says why in one line."""


def decode(stored: Stored) -> Image.Image:
    """The image, upright, in its own mode or, where that is deeper than 8 bits, as ``L``.

    ``info["mode"]`` is the mode that is stored. Raises UndecodableError: it is none, it is broken, or its
    range is not known."""
    return _guarded(stored, _decode)


def stored_image(value: Any) -> Stored:
    """An image as {bytes, path}, whatever form it is stored in."""
    if isinstance(value, bytes):
        return {"bytes": value}
    return {"path": value} if isinstance(value, str) else value


def _guarded(stored: Stored, read: Callable[[bytes], Any]) -> Any:
    try:
        return read(_content(stored))
    except Exception as error:  # Pillow's decoders raise a dozen types over broken files
        kind = "" if isinstance(error, UndecodableError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())[:200]
        raise UndecodableError(reason + _place(stored)) from error


def _place(stored: Stored) -> str:
    path = stored.get("path") if stored else None
    return f"; {text_of(path)}" if path else ""


def text_of(name: str | bytes) -> str:
    """A file name for a message: what is no UTF-8 in it is written as ``\\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _content(stored: Stored) -> bytes:
    content = stored.get("bytes") if stored else None
    if content is None and stored and stored.get("path"):
        content = _file(stored["path"])
    if content is None:
        raise UndecodableError("the row has no image")
    if not content:
        raise UndecodableError("there are no bytes in it")
    return content


def _file(path: str | bytes) -> bytes:
    """The bytes of a regular file; a pipe or a device could be read for ever."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise UndecodableError(f"no regular file of at most {_MOST_BYTES >> 20} MiB")
        return file.read(status.st_size)


def open_image(content: bytes) -> Image.Image:
    """The header of an image whose format and size are acceptable."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise UndecodableError(f"{image.width}×{image.height} pixels are more than {MOST_PIXELS}")
    return image


def _decode(content: bytes) -> Image.Image:
    with warnings.catch_warnings(action="ignore"):  # of the library, about EXIF data and sizes
        image = open_image(content)
        mode = image.mode
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation) is not None:
            ImageOps.exif_transpose(image, in_place=True)  # a new image would lack the tags of a TIFF
    if mode.startswith(("I", "F")):
        image = _in_8_bits(image)
    elif mode == "LAB":
        raise UndecodableError("mode LAB is not read; convert the image to RGB")
    image.info["mode"] = mode
    return image


def _in_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of at most 16 bits scaled so that its full range is 0 … 255."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    largest = (1 << min(tags.get(_BITS_PER_SAMPLE, (16,)))) - 1
    scaled_already = image.format in ("PNG", "PPM")  # whose reader scales any depth up to 16 bits
    if image.mode == "F" or (image.mode == "I" and not scaled_already) or largest > 65535:
        kind = "32-bit floats" if image.mode == "F" else "signed or 32-bit integers"
        raise UndecodableError(f"mode {image.mode} ({kind}) has no known range; convert it to 8 or 16 bits")
    values: NDArray[np.uint32] = np.asarray(image).astype(np.uint32)
    values = np.minimum((values * 255 + largest // 2) // largest, 255).astype(np.uint8)
    return Image.fromarray(255 - values if tags.get(_PHOTOMETRIC) == 0 else values)  # 0: white is zero


def pixels_of(image: Image.Image, channels: int) -> Tensor:
    """A decoded image as uint8[channels, H, W]; what is transparent shows white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return F.pil_to_tensor(image.convert(_PIL_MODES[channels]))


def decode_pixels(stored: Stored, channels: int) -> Tensor:
    """An image, upright, as uint8[channels, h, w]. Raises UndecodableError: as ``decode``."""
    return _guarded(stored, partial(_pixels, channels=channels))


def _pixels(content: bytes, channels: int) -> Tensor:
    plain = decode_jpeg is not None and channels == 3 and _is_plain_jpeg(content)
    pixels = _whole_jpeg(content) if plain else None
    if pixels is not None:
        return pixels
    with warnings.catch_warnings(action="ignore"):  # about palettes
        return pixels_of(_decode(content), channels)


def _is_plain_jpeg(content: bytes) -> bool:
    """Whether these are 8-bit colours in an upright JPEG; Pillow, ten times slower, is asked where there is
    metadata that may turn it."""
    place = 2 if content.startswith(b"\xff\xd8") else len(content)
    while place + 10 <= len(content) and content[place] == 0xFF:
        marker, length = struct.unpack_from(">BH", content, place + 1)
        if marker in _FRAMES:
            bits, height, width, colours = struct.unpack_from(">BHHB", content, place + 4)
            return (bits, colours) == (8, 3) and height * width <= MOST_PIXELS
        if marker == _METADATA:
            with warnings.catch_warnings(action="ignore"):
                image = open_image(content)
                upright = image.getexif().get(ExifTags.Base.Orientation) in (None, 1)
            return upright and (image.format, image.mode) == ("JPEG", "RGB")
        place += 2 + length
    return False


def _whole_jpeg(content: bytes) -> Tensor | None:
    """The pixels that Pillow would give, by the same library with fewer copies; None if it refuses."""
    try:
        return torch.from_numpy(decode_jpeg(content)).permute(2, 0, 1)
    except ValueError:
        return None
