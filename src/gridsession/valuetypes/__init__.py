"""Which values a session holds, how each is packed, and what is said of all others."""
