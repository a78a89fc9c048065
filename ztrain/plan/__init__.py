"""What a config will need, before anything is loaded: bytes, time, and on which card."""
