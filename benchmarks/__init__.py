"""Figures, each a ratio of two things measured in turn in one run: `python -m benchmarks`, see `__main__`."""
