"""``kind: ppo``: an iteration samples, scores, keeps the experience, and trains on it."""
