"""What a run will take of memory and time on a cluster: arithmetic, on a machine that has none of it."""
