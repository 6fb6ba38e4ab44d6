"""Every kind of image file against pixels that were worked out by hand."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image, ImageOps

from bim.orchestrator.data.decode import MAX_PIXELS, decode_rgb
from bim.orchestrator.data.errors import ImageDecodeError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchvision"),
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),  # about the files that are damaged on purpose
]

# where EXIF says that row 0 and column 0 of the stored pixels belong in the upright picture
EXIF_SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def png(width: int, height: int, depth: int, color: int, scanlines: bytes, extra: bytes = b"") -> bytes:
    """A PNG file put together from its chunks; scanlines without filter bytes."""
    stride = len(scanlines) // height
    rows = b"".join(b"\0" + scanlines[r * stride : (r + 1) * stride] for r in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(data: bytes) -> np.ndarray:
    """-> (H, W, 3), after checking what every caller relies on."""
    decoded = decode_rgb(data, "x")
    assert decoded.dtype == torch.uint8
    assert decoded.shape[0] == 3
    return decoded.permute(1, 2, 0).numpy()


def test_gray_is_repeated_over_the_channels():
    assert rgb(png(2, 1, 8, 0, bytes([7, 200]))).tolist() == [[[7, 7, 7], [200, 200, 200]]]


def test_one_bit_is_black_and_white():
    assert rgb(png(2, 1, 1, 0, bytes([0b01000000]))).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_rgb_is_kept():
    assert rgb(png(1, 2, 8, 2, bytes([1, 2, 3, 4, 5, 6]))).tolist() == [[[1, 2, 3]], [[4, 5, 6]]]


def test_transparent_pixels_are_blended_with_white():
    # alpha 0, 255 and 51 = 0.2: 0.2 * 100 + 0.8 * 255 = 224
    pixels = bytes([10, 20, 30, 0, 10, 20, 30, 255, 100, 100, 100, 51])
    assert rgb(png(3, 1, 8, 6, pixels)).tolist() == [[[255] * 3, [10, 20, 30], [224] * 3]]


def test_gray_with_alpha_is_blended_with_white():
    assert rgb(png(2, 1, 8, 4, bytes([9, 0, 9, 255]))).tolist() == [[[255] * 3, [9] * 3]]


def test_palette_with_transparent_entry_is_blended_with_white():
    palette = chunk(b"PLTE", bytes([200, 0, 0, 0, 200, 0])) + chunk(b"tRNS", bytes([0, 255]))
    assert rgb(png(2, 1, 8, 3, bytes([0, 1]), palette)).tolist() == [[[255, 255, 255], [0, 200, 0]]]


def test_palette_without_transparency_gives_its_colors():
    palette = chunk(b"PLTE", bytes([200, 0, 0, 0, 200, 0]))
    assert rgb(png(2, 1, 8, 3, bytes([1, 0]), palette)).tolist() == [[[0, 200, 0], [200, 0, 0]]]


def test_color_key_of_an_rgb_png_is_transparent():
    key = chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))
    assert rgb(png(2, 1, 8, 2, bytes([1, 2, 3, 4, 5, 6]), key)).tolist() == [[[255] * 3, [4, 5, 6]]]


def test_16_bit_gray_keeps_the_high_byte():
    assert rgb(png(3, 1, 16, 0, struct.pack(">HHH", 0, 0x80FF, 0xFFFF))).tolist() == [
        [[0] * 3, [128] * 3, [255] * 3]
    ]


def test_16_bit_rgb_keeps_the_high_byte():
    assert rgb(png(1, 1, 16, 2, struct.pack(">HHH", 0x0102, 0x8000, 0xFFFF))).tolist() == [[[1, 128, 255]]]


def test_16_bit_rgba_is_blended_with_white():
    pixels = struct.pack(">8H", 0x0102, 0x8000, 0xFFFF, 0xFFFF, 0x0102, 0x8000, 0xFFFF, 0)
    assert rgb(png(2, 1, 16, 6, pixels)).tolist() == [[[1, 128, 255], [255] * 3]]


def test_16_bit_gray_tiff_and_pgm_keep_the_high_byte():
    gray = np.array([[0, 0x1234, 0xFFFF]], dtype=np.uint16)
    assert rgb(saved(Image.fromarray(gray), "TIFF"))[0, :, 0].tolist() == [0, 0x12, 255]
    assert rgb(b"P5 3 1 65535\n" + gray.astype(">u2").tobytes())[0, :, 0].tolist() == [0, 0x12, 255]


def test_cmyk_becomes_rgb():
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [51, 102, 0, 51]]], dtype=np.uint8)
    image = Image.frombytes("CMYK", (4, 1), inks.tobytes())
    c, m, y, k = inks.astype(float).transpose(2, 0, 1) / 255
    expected = np.stack([(1 - c) * (1 - k), (1 - m) * (1 - k), (1 - y) * (1 - k)], axis=2) * 255
    assert np.abs(rgb(saved(image, "TIFF")) - expected).max() <= 1
    blocks = image.resize((64, 16), Image.Resampling.NEAREST)
    decoded = rgb(saved(blocks, "JPEG", quality=98))[8, 8::16]
    assert np.abs(decoded - expected[0]).max() <= 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", EXIF_SIDES)
def test_exif_orientation_is_undone(orientation: int, kind: str):
    upright = np.zeros((16, 32), dtype=np.uint8)  # four gray fields: 0, 80 over 160, 240
    upright[:8, 16:], upright[8:, :16], upright[8:, 16:] = 80, 160, 240
    height, width = upright.shape
    rows, columns = EXIF_SIDES[orientation]
    shape = (height, width) if rows in ("top", "bottom") else (width, height)
    stored = np.zeros(shape, dtype=np.uint8)
    for r in range(shape[0]):
        for c in range(shape[1]):
            at = {"top": r, "bottom": height - 1 - r, "left": r, "right": width - 1 - r}[rows]
            along = {"left": c, "right": width - 1 - c, "top": c, "bottom": height - 1 - c}[columns]
            stored[r, c] = upright[(at, along) if rows in ("top", "bottom") else (along, at)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(stored).convert("RGB"), kind, exif=exif, quality=98)
    decoded = rgb(data)
    assert decoded.shape == (16, 32, 3)
    assert np.abs(decoded[4::8, 8::16].astype(int) - upright[4::8, 8::16, None]).max() <= 6


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_fast_jpeg_path_equals_pillow_on_photographs(name: str):
    data = (Path(sklearn.datasets.__file__).parent / "images" / name).read_bytes()
    photograph = Image.open(io.BytesIO(data)).convert("RGB")
    for version in (
        data,
        *(saved(photograph, "JPEG", quality=q, subsampling=s) for q, s in ((30, 2), (90, 0))),
    ):
        expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(version))).convert("RGB"))
        assert np.array_equal(rgb(version), expected)


def test_gray_jpeg_has_three_equal_channels():
    decoded = rgb(saved(Image.new("L", (8, 8), 77), "JPEG"))
    assert (decoded == 77).all()


def test_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
    assert rgb(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


def test_damaged_exif_leaves_the_pixels():
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 20
    assert rgb(saved(Image.new("RGB", (8, 8)), "JPEG", exif=exif)).shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_truncated_files_are_bad(kind: str):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), kind)
    for length in (len(data) // 10, len(data) // 2):
        with pytest.raises(ImageDecodeError, match=r"^x: .+") as caught:
            decode_rgb(data[:length], "x")
        assert "0x" not in caught.value.reason  # the reason is the same in every process


def test_empty_and_foreign_bytes_are_bad():
    with pytest.raises(ImageDecodeError, match=r"empty"):
        decode_rgb(b"", "x")
    with pytest.raises(ImageDecodeError, match=r"none of BMP, GIF, JPEG"):
        decode_rgb(b"<html>not found</html>", "x")


def test_formats_whose_readers_start_programs_are_not_tried():
    data = saved(Image.new("RGB", (4, 4)), "EPS")
    with pytest.raises(ImageDecodeError, match=r"none of"):
        decode_rgb(data, "x")


def test_flipped_bytes_are_bad_or_decoded_but_nothing_else():
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "GIF", "TIFF"):
        data = saved(Image.fromarray(noise), kind)
        for _ in range(40):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 5):
                damaged[position] = rng.integers(256)
            try:
                decode_rgb(bytes(damaged), "x")
            except ImageDecodeError as error:
                assert error.reason  # noqa: PT017  both outcomes are right


def test_a_decompression_bomb_is_bad_before_it_is_decoded():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    with pytest.raises(ImageDecodeError, match=r"pixels"):
        decode_rgb(data, "x")


def test_the_pixel_limit_holds_when_pillows_is_lifted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    header = struct.pack(">IIBBBBB", MAX_PIXELS, 2, 8, 2, 0, 0, 0)
    with pytest.raises(ImageDecodeError, match=f"more than {MAX_PIXELS}"):
        decode_rgb(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""), "x")


def test_32_bit_pixels_of_unknown_range_are_bad():
    data = saved(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF")
    with pytest.raises(ImageDecodeError, match=r"32-bit.*8 or 16 bits"):
        decode_rgb(data, "x")


def test_an_error_of_the_program_is_not_a_bad_image(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(Image.Image, "convert")
    with pytest.raises(AttributeError, match="convert"):
        decode_rgb(png(1, 1, 8, 2, bytes(3)), "x")


def test_decode_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageDecodeError("a.png", "cut short")))
    assert (error.sample_id, error.reason, str(error)) == ("a.png", "cut short", "a.png: cut short")
