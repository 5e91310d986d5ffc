"""One page about runs, for a browser without a network: curves, growths, faults, configuration."""
