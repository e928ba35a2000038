"""Reading what people have: folders, tables, webdataset tars and embedding folders, as samples or as blocks of pairs.

Nothing here changes a file that it reads; what cannot be read becomes a `Reject` with its reason.
"""
