"""Several processes: strategies, the watchdog, agreement on errors, the launcher's environment."""
