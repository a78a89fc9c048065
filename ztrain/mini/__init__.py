"""The miniature Z-Image family: tiny models in the real folder layout and painted images."""
