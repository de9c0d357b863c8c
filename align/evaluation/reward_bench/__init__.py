"""Benchmarks of scorers and judges, one file for each, which count as the official code does. Loads no model."""
