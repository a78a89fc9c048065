"""Is it better? Adapters, the splice and plain text on the same rows and seeds, judged, with one page."""
