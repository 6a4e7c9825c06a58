"""The planner: where domains go, in which order, how many at once, and how long it takes. Pure.

    facts ──► placement   a node for each domain: memory, rules, what the destination can run
          ──► schedule    an order and shares of the links; each start, duration and the end
          ──► bound       how soon it could be over at best
    balance               the smallest set of moves that evens the nodes out

Nothing here does I/O or reads a clock: the same facts give the same plan.
"""
