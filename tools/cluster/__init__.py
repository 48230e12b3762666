"""Parts of tools/simulate_cluster.py."""
