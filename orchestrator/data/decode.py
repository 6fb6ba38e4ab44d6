"""Bytes of an image file -> RGB uint8. Grey, palette, 16-bit, CMYK, transparent and EXIF-turned images come out as a
person would see them on a white page; what cannot be decoded raises `ImageDecodeError`. No resizing, no caching.

torchvision decodes grey and RGB JPEG (about twice as fast as Pillow, the same values); everything else is Pillow's.
Colour profiles are not applied; of an animation or a stack of pages the first counts."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bim.orchestrator.data.errors import ImageDecodeError

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb (2 x 1 GiB / 4 / 3), kept if a user lifts Pillow's
# No others are tried: some of Pillow's readers start programs (EPS), and data from the internet is not to be trusted
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_ORIENTATION = 0x0112  # EXIF tag


def decode_rgb(data: bytes, name: str) -> Tensor:
    """Decode an image file. data: its bytes -> (3, H, W) uint8 RGB, upright.

    Transparent pixels are laid on white; of 16-bit values the high byte is kept. Raises ImageDecodeError(name, reason) if
    the bytes are empty, cut short, of none of FORMATS, of more than MAX_PIXELS pixels, or 32-bit without a known range.
    """
    if not data:
        raise ImageDecodeError(name, "it is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            if image.width * image.height > MAX_PIXELS:
                raise ImageDecodeError(
                    name, f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}"
                )
            if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
                decoded = _decode_jpeg(data)
                if decoded is not None:
                    return _upright(decoded, _orientation(image))
            return image_to_rgb(image)
    except (ImageDecodeError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its text holds a memory address
        raise ImageDecodeError(name, f"its bytes are none of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders meet damaged bytes with errors of every kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageDecodeError(name, reason) from error


def image_to_rgb(image: Image.Image) -> Tensor:
    """A Pillow image of any mode -> (3, H, W) uint8 RGB, upright. Raises what Pillow raises, ValueError for 32 bits."""
    image.load()  # a TIFF turns itself while loading and drops the tag
    orientation = _orientation(image)
    pixels = torch.from_numpy(_rgb_array(image)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    return _upright(pixels, orientation)


def _decode_jpeg(data: bytes) -> Tensor | None:
    """(3, H, W), or None where Pillow shall decide (it names the damage, and knows rare codings)."""
    decode = _torchvisions_decoder()
    return None if decode is None else decode(data)


@functools.cache
def _torchvisions_decoder() -> Callable[[bytes], Tensor | None] | None:
    """Imported at the first JPEG: it takes longer than importing torch, and a loader process may never meet one."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return None  # torchvision 0.29 announces that its decoders will go; Pillow gives the same pixels, more slowly

    def decode(data: bytes) -> Tensor | None:
        try:
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        except RuntimeError:
            return None

    return decode


def _rgb_array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, writable."""
    if image.mode.startswith("I;16"):
        return _grey_to_rgb(np.asarray(image) >> 8)
    if image.mode in ("I", "F"):
        # 16-bit PGM, and PNG under older Pillow; other formats put any range into these modes
        if image.mode == "F" or image.format not in ("PNG", "PPM"):
            raise ValueError(
                f"its pixels are 32-bit ({image.format}, mode {image.mode}) and their range is not known; "
                "store them with 8 or 16 bits"
            )
        return _grey_to_rgb(np.asarray(image) >> 8)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF is no damage to the picture
        return 1


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Undo the camera's rotation. EXIF orientation o in 1..8: pixels (3, H, W) -> (3, H, W), or (3, W, H) for o > 4."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return pixels.flip(flips) if flips else pixels
