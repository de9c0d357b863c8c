"""From messages to token ids and a loss mask, through the chat template, with the proof that nothing got lost."""
