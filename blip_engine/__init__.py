"""BLIP in PyTorch and a resident engine that batches its three tasks.

Names are imported on first use: `import blip_engine.requests` loads neither torch nor Pillow.
"""
