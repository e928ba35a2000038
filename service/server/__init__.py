"""The process: sockets, signals, draining, and limits per connection."""
