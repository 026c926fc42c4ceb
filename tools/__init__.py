"""Command-line tools around the package: data preparation, quick start, tests."""
