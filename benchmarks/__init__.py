"""One script for each claim: `python -m benchmarks.NAME`. Measured rows are in results/."""
