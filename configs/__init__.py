"""Configs: get_config(arg) returns an ml_collections.ConfigDict; the docstring gives command, expected metric and cost."""
