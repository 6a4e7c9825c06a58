"""What the tests of whole clusters share: one lab, its guests, a client that watches, an inventory.

`world` is the lab with its agents and guests, `client` what a guest's users see, `inventory` what
there is on the nodes, counted before and after.
"""
