"""Where the tokens of a text go, and what they look at."""
