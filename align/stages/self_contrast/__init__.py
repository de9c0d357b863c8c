"""``kind: self_contrast``: preferences from a policy and the data it was tuned on."""
