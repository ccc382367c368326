"""Measuring the operators: `fastsae bench`, and the core that `benchmarks/` shares with it."""
