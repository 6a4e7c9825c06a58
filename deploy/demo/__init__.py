"""`ferry demo`: a web server moves around a cluster while a client watches it.

`story` tells it, `client` is the process that watches, `tally` turns what arrives into
`observations`, `report` compares them with the migrations, `figure` draws them, `screen` prints.
"""
