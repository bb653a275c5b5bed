"""Tasks, their rows, the token ids of their texts, and their metrics."""
