"""`python -m orchestrator`: the control loop, as `blip-batch orchestrator`."""

import sys

from .cli import main

sys.argv = [sys.argv[0], "orchestrator", *sys.argv[1:]]
main()
