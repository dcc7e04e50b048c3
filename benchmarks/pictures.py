"""Pictures of the docs: PNG files of at most 60 kB.

python -m benchmarks.pictures runs/reproduce/rc.png reproduce-rc.png
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets"
MOST_BYTES, MOST_PIXELS = 60_000, 1100


def publish(source: Path, name: str | None = None) -> Path:
    """Write a picture to `docs/assets`, scaled to 1,100 pixels and with as few colors as needed."""
    image = Image.open(source).convert("RGB")
    if image.width > MOST_PIXELS:
        height = round(image.height * MOST_PIXELS / image.width)
        image = image.resize((MOST_PIXELS, height), Image.Resampling.LANCZOS)
    target = ASSETS / (name or source.name)
    for colors in (64, 32, 24, 16):
        buffer = io.BytesIO()
        palette = image.quantize(colors, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        palette.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= MOST_BYTES:
            break
    target.write_bytes(buffer.getvalue())
    return target


if __name__ == "__main__":
    print(publish(Path(sys.argv[1]), sys.argv[2]))
