"""Manifests: which format one is, its rows as lines, and where chunks of them begin and end.

Memory does not grow with the manifest. Lines without compression are planned where they are; everything else is staged
once as JSON Lines beside the plan (`staging`).
"""

from .chunking import choose_chunk_rows, scan
from .formats import detect
from .source import Source, is_folder, open_manifest, stored_rows
from .staging import require_rows, staged

__all__ = [
    "Source", "choose_chunk_rows", "detect", "is_folder", "open_manifest", "require_rows", "scan", "staged",
    "stored_rows",
]  # fmt: skip
