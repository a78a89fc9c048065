"""Triplets as rows: read from folders, tars, Parquet and the Hub, and checked before anything is decoded."""
