"""``kind: ppo``: each iteration samples answers, scores them, saves the experience, and trains on it."""
