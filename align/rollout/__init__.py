"""Rollouts: engines that sample token ids for prompts from the weights in training."""
