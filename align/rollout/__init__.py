"""Rollouts: token ids in, sampled token ids out, from the weights that are being trained."""
