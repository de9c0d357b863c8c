"""Planning a run: what it would do, with every derived value and its source. Runs nothing."""
