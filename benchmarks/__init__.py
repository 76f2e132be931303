"""Measurements: one command each, JSON and a table out. Nothing here runs as a timed test."""
