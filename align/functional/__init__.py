"""Pure tensor functions: log-probs and losses. No model, no configuration, no state."""
