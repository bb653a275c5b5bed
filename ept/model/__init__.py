"""A frozen language model with a prompt in front of the text, or something trained inside it."""
