"""Parts of the routing page: its tabs, their controls, simulators and the tokens of a path."""
