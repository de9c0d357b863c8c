"""From messages to token ids and a loss mask through the chat template, with checks that nothing is lost."""
