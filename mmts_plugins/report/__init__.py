"""Pages and plots of cluster tables, schedules and runs: ``mmts report``, ``mmts plot``, and the demo's page."""
