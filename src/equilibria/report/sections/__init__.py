"""What there is to see of runs, one section per file, each a function of the runs alone."""
