"""Measurements that the experiments share, and their subjects."""
