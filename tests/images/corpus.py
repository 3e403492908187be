"""Files made to hurt or to mislead, all of them made here: `python -m tests.images.corpus FOLDER` writes them out.

Each is to end as in the engine: with Pillow's pixels, or refused where Pillow refuses.
"""

from __future__ import annotations

import io
import random
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sidecar.tools import synthetic_photos

from . import jpegs

Files = Iterator[tuple[str, bytes]]
PNG = b"\x89PNG\r\n\x1a\n"
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    """A file as Pillow writes it."""
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def picture(width: int = 67, height: int = 53, seed: int = 9) -> Image.Image:
    """A small photograph."""
    return Image.fromarray(synthetic_photos.pixels(width, height, seed))


def chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    """A chunk of a PNG file."""
    return (
        struct.pack("!I", len(body)) + kind + body + struct.pack("!I", zlib.crc32(kind + body) if crc is None else crc)
    )


def png(
    width: int, height: int, rows: bytes = b"", depth: int = 8, color: int = 2, lace: int = 0, extra: bytes = b""
) -> bytes:
    """A PNG file that says one size and holds what it is given; `extra`: chunks before the pixels."""
    head = chunk(b"IHDR", struct.pack("!IIBBBBB", width, height, depth, color, 0, 0, lace))
    return PNG + head + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rows(width: int, height: int, bits: int, dice: random.Random) -> bytes:
    """Filtered rows of random pixels of so many bits; filter 0 to 4."""
    return b"".join(bytes((dice.randint(0, 4),)) + dice.randbytes((width * bits + 7) // 8) for _ in range(height))


def every_png() -> Files:
    """Each colour type and depth, plain and interlaced, with and without tRNS; short and missing palettes."""
    dice, width, height = random.Random(1), 19, 11
    for color, depths in DEPTHS.items():
        for depth in depths:
            bits = CHANNELS[color] * depth
            whole = rows(width, height, bits, dice)
            laced = b"".join(rows(-(-(width - x) // dx), -(-(height - y) // dy), bits, dice) for y, x, dy, dx in ADAM7)
            for palette in (b"", chunk(b"PLTE", dice.randbytes(3 * 16)), chunk(b"PLTE", dice.randbytes(3 * 256))):
                for clear in (b"", chunk(b"tRNS", dice.randbytes(6)), chunk(b"tRNS", dice.randbytes(1))):
                    name = f"png type {color} depth {depth} palette {len(palette)}, tRNS {len(clear)}"
                    yield name, png(width, height, whole, depth, color, 0, palette + clear)
            yield f"png type {color} depth {depth} interlaced", png(width, height, laced, depth, color, 1)


def odd_pngs() -> Files:
    """Damaged, padded and packed PNG files."""
    whole = saved(picture(), "PNG")
    row = b"\0" + bytes(3 * 64)
    gone = chunk(b"IEND", b"")
    yield "png filter 9", png(64, 64, (b"\x09" + bytes(192)) * 64)
    yield "png too few rows", png(64, 64, row * 20)
    yield "png too many rows", png(64, 64, row * 900)
    yield "png pixel bomb", png(64, 64, bytes(64 << 20))
    yield "png text bomb", png(64, 64, row * 64, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20))))
    yield "png profile bomb", png(64, 64, row * 64, extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80 << 20))))
    yield (
        "png international text bomb",
        png(64, 64, row * 64, extra=chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(80 << 20)))),
    )
    yield "png many texts", png(64, 64, row * 64, extra=chunk(b"tEXt", b"a\0b") * 20_000)
    yield (
        "png many pieces",
        PNG
        + chunk(b"IHDR", struct.pack("!IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
        + b"".join(chunk(b"IDAT", bytes((b,))) for b in zlib.compress(row * 64))
        + gone,
    )
    yield "png without end", whole[:-12]
    yield "png with a second start", whole[:33] + whole[8:]
    yield "png wrong crc of the head", whole[:29] + b"\0\0\0\0" + whole[33:]
    yield "png wrong crc of pixels", whole[:-20] + b"\0\0\0\0" + whole[-16:]
    yield "png wrong crc of a text", png(64, 64, row * 64, extra=chunk(b"tEXt", b"a\0b", 0))
    yield "png length past the end", whole[:33] + struct.pack("!I", 0x7FFFFFFF) + whole[37:]
    yield "png length negative", whole[:33] + struct.pack("!I", 0xFFFFFFFF) + whole[37:]
    yield "png type 5", png(64, 64, row * 64, color=5)
    yield "png depth 3", png(64, 64, row * 64, depth=3)
    yield "png interlace 2", png(64, 64, row * 64, lace=2)
    yield "png with a profile", saved(picture(), "PNG", icc_profile=bytes(range(200)))
    yield "png with gamma", png(64, 64, row * 64, extra=chunk(b"gAMA", struct.pack("!I", 20_000)))
    for how in (0, 3, 6, 8, 9):
        exif = Image.Exif()
        exif[0x0112] = how
        yield f"png turned {how}", saved(picture(), "PNG", exif=exif)


def turned(how: int, format: str) -> bytes:
    """A picture with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = how
    return saved(picture(), format, exif=exif)


def every_jpeg() -> Files:
    """Each sampling, each kind of frame, each number of components, each word of Adobe's on their colours."""
    dice = random.Random(2)
    factors = [(h, v) for h in (1, 2, 3, 4) for v in (1, 2, 3, 4)]
    for i, luma in enumerate(factors):
        chroma = ((1, 1), (2, 1), (1, 2), (2, 2))[i % 4]
        yield f"jpeg sampling {luma} {chroma}", jpegs.jpeg(67, 53, [luma, chroma, chroma], seed=i)
        yield f"jpeg small sampling {luma}", jpegs.jpeg(33, 17, [luma, (1, 1), (1, 1)], seed=i)
    jfif = jpegs.segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")
    for parts in range(1, 6):
        for i, extra in enumerate((b"", jfif, *(jpegs.adobe(n) for n in (0, 1, 2, 9)), jfif + jpegs.adobe(0))):
            ids = dice.choice((jpegs.YCC, jpegs.RGB, (0, 1, 2), (1, 34, 35)))
            yield f"jpeg {parts} parts {ids} makers {i}", jpegs.jpeg(21, 13, [(1, 1)] * parts, ids=ids, extra=extra)
    for marker in sorted(set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}):
        for bits in (2, 8, 12, 16):
            yield f"jpeg frame {marker:x} of {bits} bits", jpegs.jpeg(21, 13, [(1, 1)] * 3, marker=marker, bits=bits)
    yield "jpeg the same part twice", jpegs.jpeg(21, 13, [(1, 1)] * 3, ids=(9, 9, 9))
    yield "jpeg sampling 0", jpegs.jpeg(21, 13, [(1, 1)] * 3).replace(b"\1\x11\0", b"\1\0\0", 1)
    yield "jpeg sampling 15", jpegs.jpeg(21, 13, [(1, 1)] * 3).replace(b"\1\x11\0", b"\1\xff\0", 1)


def odd_jpegs() -> Files:
    """Files with several images, with wrong metadata, and with segments that are missing, repeated or misplaced."""
    whole, cmyk = synthetic_photos.photo(67, 53, 3), saved(picture().convert("CMYK"), "JPEG")
    table, frame, scan = (whole.index(bytes((0xFF, marker))) for marker in (0xDB, 0xC0, 0xDA))
    huffman = whole.index(b"\xff\xc4")
    yield "jpeg cmyk", cmyk
    yield "jpeg ycck", cmyk.replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2")
    yield "jpeg cmyk, not Adobe's", cmyk.replace(b"Adobe\0d", b"Xdobe\0d")
    yield "jpeg of two pictures", saved(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    yield "jpeg said to be of two", whole[:2] + jpegs.segment(0xE2, b"MPF\0" + bytes(40)) + whole[2:]
    yield "jpeg with a profile", saved(picture(), "JPEG", icc_profile=bytes(range(200)) * 400)
    yield "jpeg progressive", saved(picture(), "JPEG", progressive=True)
    yield "jpeg restarts", saved(picture(), "JPEG", restart_marker_blocks=1)
    yield "jpeg restarts damaged", saved(picture(), "JPEG", restart_marker_blocks=1).replace(b"\xff\xd1", b"\xff\xd6")
    yield "jpeg without tables", whole[:table] + whole[frame:]
    yield "jpeg without codes", whole[:huffman] + whole[scan:]
    yield "jpeg without frame", whole[:frame] + whole[frame + 19 :]
    yield "jpeg with two frames", whole[:frame] + whole[frame : frame + 19] * 2 + whole[frame + 19 :]
    yield "jpeg with two starts", whole[:2] + whole
    yield "jpeg without end", whole[:-2]
    yield "jpeg no pixels", whole[:scan] + b"\xff\xd9"
    yield "jpeg fill bytes", whole[:table] + b"\xff" * 1000 + whole[table:]
    yield "jpeg zeros between segments", whole[:table] + bytes(30) + whole[table:]
    yield "jpeg noise between segments", whole[:table] + b"\xff\0ab\xff\x01\xff\xd0" + whole[table:]
    yield "jpeg segment of length 0", whole[:2] + b"\xff\xe3\0\0" + whole[2:]
    yield "jpeg segment of length 1", whole[:2] + b"\xff\xe3\0\1" + whole[2:]
    yield "jpeg many segments", whole[:2] + jpegs.segment(0xE3, b"") * 50_000 + whole[2:]
    yield "jpeg long comment", whole[:2] + jpegs.segment(0xFE, bytes(65_533)) * 20 + whole[2:]
    yield "jpeg bytes behind", whole + bytes(5000)
    yield "jpeg file behind", whole + saved(picture(seed=1), "JPEG")
    yield "jpeg zip behind", whole + b"PK\3\4" + bytes(60) + b"PK\5\6" + bytes(18)
    yield "jpeg inside a comment", whole[:2] + jpegs.segment(0xFE, saved(picture(9, 9), "JPEG")) + whole[2:]
    for how in range(10):
        yield f"jpeg turned {how}", synthetic_photos.photo(67, 53, exif_orientation=how)
    for i, exif in enumerate(
        (
            b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03",
            b"MM\0*\0\0\0\x08\xff\xff",
            b"II*\0\xff\xff\xff\xff",
            b"II*\0\x08\0\0\0\1\0\x12\1\3\0\xff\xff\xff\xff\6\0\0\0",
            b"MM\0*\0\0\0\x08\0\1\1\x12\0\5\0\0\0\1\0\0\0\x08",
            b"MM\0*\0\0\0\x08\0\2\1\x12\0\3\0\0\0\1\0\6\0\0\x87\x69\0\4\0\0\0\1\0\0\0\x08\0\0\0\0",
            b"",
            b"XX",
        )
    ):
        yield f"jpeg broken exif {i}", whole[:2] + jpegs.segment(0xE1, b"Exif\0\0" + exif) + whole[2:]
    for width, height in ((1, 1), (8, 8), (64, 0), (0, 64), (0, 0), (4000, 4000), (66, 53), (67, 530)):
        lie = bytearray(whole)
        lie[frame + 5 : frame + 9] = struct.pack("!HH", height, width)
        yield f"jpeg says {width} x {height}", bytes(lie)


def others() -> Files:
    """WebP, GIF, BMP and TIFF: animated, turned, lying, packed."""
    base, more = picture(), [picture(seed=1), picture(seed=2)]
    clear = base.convert("RGBA")
    clear.putalpha(picture(seed=4).convert("L"))
    lossy = saved(base, "WEBP", quality=60)
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        yield f"{format} animated", saved(base, format, save_all=True, append_images=more)
    for how in (3, 6):
        yield from ((f"{format} turned {how}", turned(how, format)) for format in ("WEBP", "TIFF"))
    yield "webp alpha", saved(clear, "WEBP", quality=60)
    yield "webp lossless alpha", saved(clear, "WEBP", lossless=True)
    yield "webp profile", saved(base, "WEBP", icc_profile=bytes(range(200)))
    yield "webp scaled", lossy[:27] + bytes((lossy[27] | 0xC0,)) + lossy[28:]
    yield "webp not a key frame", lossy[:20] + bytes((lossy[20] | 1,)) + lossy[21:]
    yield "webp not shown", lossy[:20] + bytes((lossy[20] & ~0x10,)) + lossy[21:]
    yield from (
        (f"webp profile {n}", lossy[:20] + bytes((lossy[20] & ~0xE | n << 1,)) + lossy[21:]) for n in (1, 2, 3, 5)
    )
    yield "webp length too long", lossy[:4] + struct.pack("<I", 1 << 30) + lossy[8:]
    yield "webp length too short", lossy[:4] + struct.pack("<I", 60) + lossy[8:]
    yield "webp bytes behind", lossy + bytes(99)
    yield (
        "webp canvas too large",
        b"RIFF"
        + struct.pack("<I", len(lossy) + 10)
        + b"WEBPVP8X\n\0\0\0"
        + bytes(4)
        + b"\xff\1\0\xff\1\0"
        + lossy[12:],
    )
    gif = saved(base, "GIF")
    yield "gif transparent", saved(base.quantize(32), "GIF", transparency=0)
    yield "gif frame past the screen", gif[:6] + struct.pack("<HH", 5, 5) + gif[10:]
    yield "gif frame within the screen", gif[:6] + struct.pack("<HH", 500, 300) + gif[10:]
    yield "gif code size 12", gif.replace(b"\0\x08", b"\0\x0c", 1)
    yield "gif of no frame", gif[:13] + b";"
    yield "gif script", b"GIF89a/*" + gif[8:] + b"*/=1;alert(1)"
    bmp = saved(base, "BMP")
    for at, values in (
        (10, (0, 7, 1 << 31)),
        (14, (12, 13, 40, 108, 124, 1 << 31)),
        (28, (1, 4, 8, 16, 32, 33)),
        (30, (1, 2, 3, 4, 5, 6)),
        (46, (1, 1 << 31)),
    ):
        for value in values:
            yield (
                f"bmp {value} at {at}",
                bmp[:at] + struct.pack("<I" if at != 28 else "<H", value) + bmp[at + (4 if at != 28 else 2) :],
            )
    yield "bmp upside down", bmp[:22] + struct.pack("<i", -53) + bmp[26:]
    yield (
        "bmp packed",
        saved(base.quantize(16), "BMP")[:30] + struct.pack("<I", 1) + saved(base.quantize(16), "BMP")[34:],
    )
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "raw"):
        yield f"tiff {compression}", saved(base, "TIFF", compression=compression)
    for mode in ("1", "L", "LA", "P", "CMYK", "YCbCr", "I;16", "F", "I"):
        yield (
            f"tiff {mode}",
            saved(base.convert("L").convert(mode) if mode in ("I;16", "F", "I") else base.convert(mode), "TIFF"),
        )
    yield "tiff LAB", saved(Image.frombytes("LAB", base.size, base.tobytes()), "TIFF")
    yield from lying_tiffs()


def lying_tiffs() -> Files:
    """Directories that loop, point nowhere, or count far too much."""
    head = b"II*\0\x08\0\0\0"
    size = struct.pack("<HHIIHHII", 256, 4, 1, 64, 257, 4, 1, 64)
    yield "tiff directory of itself", head + b"\1\0" + struct.pack("<HHII", 330, 4, 1, 8) + struct.pack("<I", 8)
    yield "tiff directory nowhere", b"II*\0\xff\xff\xff\x7f"
    yield "tiff count of bits", head + b"\3\0" + size + struct.pack("<HHII", 258, 3, 0xFFFFFFFF, 8) + bytes(4)
    yield (
        "tiff strips nowhere",
        head + b"\4\0" + size + struct.pack("<HHIIHHII", 273, 4, 1, 0x7FFFFFF0, 279, 4, 1, 12288) + bytes(4),
    )
    yield (
        "tiff tiles of size 0",
        head + b"\4\0" + size + struct.pack("<HHIIHHII", 322, 4, 1, 0, 323, 4, 1, 0) + bytes(4),
    )
    yield "tiff unknown compression", head + b"\3\0" + size + struct.pack("<HHII", 259, 3, 1, 60_000) + bytes(4)


def shapes() -> Files:
    """The smallest, the longest and the highest."""
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        longest = 16_383 if format == "WEBP" else 65_500
        for size in ((1, 1), (2, 1), (1, 7), (200, 1), (201, 1), (longest, 1), (1, longest)):
            yield (
                f"{format} {size[0]} x {size[1]}",
                saved(Image.fromarray(np.resize(np.arange(251, dtype=np.uint8), (size[1], size[0], 3))), format),
            )


def cut_off() -> Files:
    """Files of every kind, cut at many places, and with bytes changed."""
    dice = random.Random(3)
    base = picture()
    whole = {format: saved(base, format) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}
    whole["JPEG progressive"] = saved(base, "JPEG", progressive=True)
    whole["WEBP lossless"] = saved(base, "WEBP", lossless=True)
    whole["WEBP animated"] = saved(base, "WEBP", save_all=True, append_images=[picture(seed=1)])
    whole["TIFF packed"] = saved(base, "TIFF", compression="tiff_lzw")
    for name, data in whole.items():
        for at in {
            *(12 + i * i for i in range(12)),
            *(len(data) * i // 9 for i in range(1, 9)),
            len(data) - 1,
            len(data) - 2,
        }:
            if 12 <= at < len(data):
                yield f"{name} cut at {at}", data[:at]
        for n in range(12):
            changed = bytearray(data)
            for _ in range(1 + n % 3):
                changed[dice.randrange(12, len(data))] = dice.randrange(256)
            yield f"{name} changed {n}", bytes(changed)


def doubles() -> Files:
    """Files that are two things at once."""
    jpeg, gif = saved(picture(), "JPEG"), saved(picture(), "GIF")
    yield "gif and zip", gif + b"PK\3\4" + bytes(60)
    yield "jpeg as png", PNG + jpeg
    yield "png as jpeg", b"\xff\xd8\xff" + saved(picture(), "PNG")
    yield "bmp and jpeg", b"BM" + jpeg
    yield "riff wave", b"RIFF\x24\0\0\0WAVEfmt " + bytes(30)
    yield "tiff and jpeg", b"II*\0" + jpeg


def all_files() -> dict[str, bytes]:
    """Name -> file; each is to end as in the engine."""
    made: dict[str, bytes] = {}
    for files in (every_png, odd_pngs, every_jpeg, odd_jpegs, others, shapes, cut_off, doubles):
        for name, data in files():
            assert name not in made, name
            made[name] = data
    return made


def main(folder: Path) -> None:
    """Write every file into `folder`, by number."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(all_files().values()):
        (folder / f"{i:04}").write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
