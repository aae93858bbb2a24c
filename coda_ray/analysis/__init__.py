"""Metrics and label-free criteria: arrays in, numbers out."""
