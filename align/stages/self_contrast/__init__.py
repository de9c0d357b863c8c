"""``kind: self_contrast``: preferences made from a policy's samples and the data that it was tuned on."""
