"""`ferry doctor`: what keeps a node from being a good member, and how to mend it."""
