"""Who may call: keys with roles and limits, the token of the store, and the allowed hosts."""
