"""Benchmarks and probes whose answers a program can grade."""
