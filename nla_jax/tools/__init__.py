"""What the commands around a study do: explain, accept, plan, benchmark, and the report's page."""
