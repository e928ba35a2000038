"""The check of the product on a GPU: `loadtests/gpu.sh` runs it from the root of a checkout.

`check` runs each part in a process of its own; parts that need the packages are in
`models/benchmarks/gpu`.
"""
