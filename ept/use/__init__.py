"""A trained prompt in use: it answers, is shared, and is worked with from the command line."""
