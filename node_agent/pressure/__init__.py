"""Pressure: a load balancer or an alert says that a domain or a node is overloaded.

policy.py     pure: is it enough to act upon? which domain would relieve it, and where to?
service.py    keeps what was said, proposes a move, or makes it
turn.py       one move at a time, in the whole cluster
"""
