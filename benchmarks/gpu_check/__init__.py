"""The first quarter of an hour on a GPU: what must be right there, and how fast it is."""
