"""Scores of pictures, their intervals, and the towers that turn pictures into vectors."""
