"""LongBench (2308.14508): its files, prompts and metrics, answered with every method."""
