"""What every run needs: records, checkpoints, metrics, watchdogs, several hosts, errors."""
