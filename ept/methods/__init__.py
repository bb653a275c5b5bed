"""One module a method: EPT with its ablations, and what it is compared with."""
