"""`make chaos`: real processes, links and servers fail at each step of a real handoff.

run.py     options, the table      cells.py   one cell: a migration, a step, a fault, a judgement
faults.py  what can fail           judge.py   what must be true afterwards
"""
