"""Measurements: one command each, JSON and a table out. Nothing here runs as a timed test."""

from workers.cpus import settle_threads

settle_threads()  # as in an engine's process, and before torch is imported; the processes of peers inherit it
