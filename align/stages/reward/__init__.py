"""``kind: reward``: a reward model, from comparisons or from grades."""
