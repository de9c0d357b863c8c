"""``kind: evaluate``: policies compared on held-out data, benchmarks, scorers and judges."""
