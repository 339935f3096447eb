"""What of an answer is content, reasoning, or a call of a tool: one file for each format, see `api`. Pure."""
