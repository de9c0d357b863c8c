"""What several kinds of stages have in common: data, models, training, rollouts, scoring."""
