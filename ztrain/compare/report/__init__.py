"""Pages about comparisons and runs: page.py makes them, of words, charts and curves; runs.py reads a run's folder."""
