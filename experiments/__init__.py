"""Thin absl binaries: train, sample, evaluate, export. The work is in flowjax."""
