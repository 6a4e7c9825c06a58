"""Host routes set by netlink on every node and router that is told, over UDP."""
