"""Sessions under real servers: several processes, killed, stopped, recycled and abandoned."""
