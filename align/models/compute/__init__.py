"""From a batch of packed trees to log-probs and hidden states."""
