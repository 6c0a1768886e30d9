"""Where a solve starts: zeros, noise, the previous call, a cache of the data set."""
