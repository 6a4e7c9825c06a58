"""Host routes that follow a domain: how the routers of the guests' network are told."""
