"""Emptying nodes for maintenance, and bringing their domains home.

service ──► store          drains/ID, by compare-and-set; who coordinates, its heartbeat
   │
coordinator ── events ──►  machine   (pure: decides)
   │       ◄── commands ──
   ├──► ClusterService     migrations, stops, starts: on the nodes that own the domains
   ├──► survey ──► planner (pure: where to, in which order, how long)
   └──► cordons            cordons/NODE: nothing comes to a node that is kept free
"""
