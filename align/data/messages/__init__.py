"""Messages, tool calls and dialogues as other data spell them, turned into ours."""
