"""Does growing pay? Arms x seeds x learning rates, run in pieces, and what they say. See docs/growth_experiments.md."""
