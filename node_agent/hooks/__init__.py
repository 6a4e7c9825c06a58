"""Hooks: load balancers and other outsiders are told, asked and waited for around each move.

model.py     hooks as users define them, calls, outcomes
port.py      what a driver does
haproxy.py webhook.py command.py    the drivers
service.py   which hooks a moment has; runs them, each within its deadline
"""
