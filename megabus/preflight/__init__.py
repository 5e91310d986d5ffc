"""What is looked at before training, in seconds and on all ranks: docs/preflight.md has every check."""
