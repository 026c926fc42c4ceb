"""Studies: small-scale ablations with the published direction to look for. Each writes its table and figures beside itself.

    python -m experiments.study <name> [--runs=runs/studies] [--seeds=3]

Runs that are finished and measurements that are stored are not repeated.
"""
