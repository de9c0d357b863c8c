"""Converting messages, tool calls and dialogues of other formats to this package's form."""
