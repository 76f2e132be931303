"""What a loader process does with one image: fetch, decode, resize, put into its slot. Every failure has a code."""

from typing import Any

from blip_engine.errors import ImageError
from blip_engine.images import ImageLimits, decode_image, resized_pixels
from orchestrator.errors import FetchError
from orchestrator.fetch import fetch

from .loader import LoaderLimits
from .messages import Failure
from .slots import DECODING, Slots


def load_into(slots: Slots, slot: int, location: Any, size: tuple[int, int], limits: LoaderLimits) -> Failure | None:
    """Fill `slot` with the image at `location`, resized to `size` (height, width); what went wrong, or None."""
    try:
        data = fetch(location, limits.max_bytes, limits.fetch_timeout)
        slots.set_phase(slot, DECODING)
        image = decode_image(data, ImageLimits(max_bytes=limits.max_bytes, max_pixels=limits.max_pixels))
        slots.pixels(slot, size)[...] = resized_pixels(image, size)
    except (FetchError, ImageError) as error:
        return Failure(error.code, str(error))
    except MemoryError:
        return Failure("out_of_memory", "not enough memory to decode the image")
    except Exception as error:
        return Failure("internal", f"loading failed: {type(error).__name__}: {error}"[:500])
    return None
