"""Training runs as slurm jobs: the job script, how it is filled in, and sweeps."""
