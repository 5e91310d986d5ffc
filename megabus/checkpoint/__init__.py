"""Checkpoints on disk: sharded, atomic, verified, and readable by any layout."""
