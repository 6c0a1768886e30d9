"""Looking at runs: plots, and what they say about the solves."""
