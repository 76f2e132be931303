"""The HTTP API: FastAPI, served beside the control loop. All of its state is in Redis, so any orchestrator answers."""

from .app import create_app
from .server import ApiServer

__all__ = ["ApiServer", "create_app"]
