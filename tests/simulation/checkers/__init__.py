"""The five invariants of a handoff, as looked at from outside; a module each.

1 one_runner   whenever vCPUs are set going or the record is written
2 memory       whenever a guest that stood still is continued
3 writes       at each write to a volume, and before the first vCPU runs
4 liveness     whenever a copy is destroyed, and at the end
5 recovery     at the end: every session ended, nothing was left behind

shown: what users are told of an end, after each event
"""
