"""Losses and measurements that keep the map a contraction; one file each."""
