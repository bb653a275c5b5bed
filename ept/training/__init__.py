"""Train one prompt, rank the labels, evaluate."""
