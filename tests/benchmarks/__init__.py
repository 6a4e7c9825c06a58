"""How fast Ferry is, beside what else moves guests: `make bench` (`tests.benchmarks.run`).

cases.py    what is moved, under which load, over which link
engines.py  who moves it, by name; ferry.py, native.py, libvirt.py, raw_speed.py do it
client.py   the guest's user in the lab's client namespace: counts the packets of each millisecond
results.py  one run's figures, medians and worst cases
bars.py     what they are held against
output.py   build/bench.json, the table, the plots
"""
