"""`reco eval`: measures on one's own data whether a memory helps.

`commands` and `options` hold the flags; `inputs` reads the model, the memory and the data; `output`
prints the table and writes the report.
"""
