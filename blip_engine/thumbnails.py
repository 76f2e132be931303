"""Small JPEGs of a folder's images, for pages; a program of its own, for who calls it does without Pillow.

    python -m blip_engine.thumbnails FOLDER SIZE

writes `NAME.jpg`, at most SIZE pixels wide and high, for every file NAME that is an image; others are left out.
"""

import sys
from pathlib import Path

from .errors import ImageError
from .images import decode_image


def write(folder: Path, size: int) -> int:
    """The number of thumbnails that were written."""
    count = 0
    for path in sorted(folder.iterdir()):
        try:
            image = decode_image(path.read_bytes())
        except (ImageError, MemoryError):  # no image that we read: it has no thumbnail
            continue
        image.thumbnail((size, size))
        image.save(folder / f"{path.name}.jpg", quality=80)
        count += 1
    return count


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
