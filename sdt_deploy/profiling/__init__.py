"""Where the time of a run goes: stages, operators, and the host around them."""
