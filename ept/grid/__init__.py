"""A parameter file becomes runs, and runs become records."""
