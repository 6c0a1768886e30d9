"""What is to be learnt: losses, metrics and honest baselines; nothing about models or data sets."""
