"""Machinery: data, devices, training, checkpoints, statistics, logs."""
