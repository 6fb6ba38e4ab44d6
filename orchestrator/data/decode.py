"""Bytes of an image file -> RGB uint8. Gray, palette, 16-bit, CMYK, transparent and EXIF-rotated images come out
as a viewer shows them on a white page.

torchvision decodes gray and RGB JPEG (about twice as fast as Pillow, the same values), Pillow everything else.
Color profiles are not applied; of an animation or a stack of pages the first frame counts."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bim.orchestrator.data.errors import DataError, ImageDecodeError, is_exhausted, system_reason

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb (2 x 1 GiB / 4 / 3), kept if a user lifts Pillow's
# No other format is tried: some of Pillow's readers start programs (EPS), and data from the internet is not trusted
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# What decoders raise for damaged bytes. An AttributeError or a TypeError is an error of the program and stops the run.
DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, RuntimeError, LookupError, ArithmeticError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_ORIENTATION = 0x0112  # EXIF tag


def decode_rgb(data: bytes, sample_id: str) -> Tensor:
    """Decode an image file. data: its bytes -> (3, H, W) uint8 RGB, upright.

    Transparent pixels are blended with white; of 16-bit values the high byte is kept. Raises ImageDecodeError if
    the bytes are empty, truncated, of none of FORMATS, of more than MAX_PIXELS pixels, or 32-bit of unknown range.
    """
    if not data:
        raise ImageDecodeError(sample_id, "it is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
                pixels = _jpeg_decoder()(data)
                if pixels is not None:
                    return _exif_transpose(pixels, _orientation(image))
            return image_to_rgb(image)
    except UnidentifiedImageError as error:  # its text holds a memory address
        raise ImageDecodeError(sample_id, f"its bytes are none of {', '.join(FORMATS)}") from error
    except DECODER_ERRORS as error:
        raise ImageDecodeError(sample_id, decoder_message(error)) from error


def decode_error(sample_id: str, error: Exception) -> ImageDecodeError | DataError:
    """The error for one of `DECODER_ERRORS`: of the image, unless a limit of the system keeps any image from being read."""
    if isinstance(error, OSError) and is_exhausted(error):
        return DataError(f"{sample_id} cannot be read: {system_reason(error)}")
    return ImageDecodeError(sample_id, decoder_message(error))


def decoder_message(error: Exception) -> str:
    """The text of a decoder's error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def image_to_rgb(image: Image.Image) -> Tensor:
    """A Pillow image of any mode -> (3, H, W) uint8 RGB, upright. Raises one of DECODER_ERRORS."""
    image.load()  # a TIFF rotates itself while loading and drops the tag
    orientation = _orientation(image)
    pixels = torch.from_numpy(_rgb_array(image)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    return _exif_transpose(pixels, orientation)


@functools.cache
def _jpeg_decoder() -> Callable[[bytes], Tensor | None]:
    """torchvision's decoder, bytes -> (3, H, W), or None where Pillow decides (it names the damage and knows rare codings).

    Imported at the first JPEG: the import takes longer than torch's, and a worker may never meet a JPEG.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        # torchvision 0.29 deprecates its decoders; Pillow gives the same pixels more slowly.
        return lambda data: None

    def decode(data: bytes) -> Tensor | None:
        try:
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        except RuntimeError:
            return None

    return decode


def _rgb_array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, writable."""
    # Mode I holds 16-bit PGM, and 16-bit PNG under older Pillow; other formats put any range into I and F
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not is_16_bit:
        raise ValueError(
            f"its pixels are 32-bit ({image.format}, mode {image.mode}) and their range is not known; "
            "store them with 8 or 16 bits"
        )
    if is_16_bit:
        gray = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (*DECODER_ERRORS, TypeError):
        # Damaged EXIF, such as a tuple for a number, leaves the pixels intact.
        return 1


def _exif_transpose(pixels: Tensor, orientation: int) -> Tensor:
    """Undo the camera's rotation. EXIF orientation o in 1..8: (3, H, W) -> (3, H, W), or (3, W, H) for o > 4."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return pixels.flip(flips) if flips else pixels
