"""Running several ranks in one test: forked processes, results by rank, a time-out that shows every stack."""
