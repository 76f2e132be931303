"""The HTTP API: FastAPI, served beside the control loop. All of its state is in Redis, so any orchestrator answers.

`server` runs it, `app` puts it together, `routes` has its handlers, `models` what goes over the wire, `guard` the token
and the limits, `problems` its errors.
"""
