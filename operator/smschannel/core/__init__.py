"""The pure core: decisions and what they are made of. No I/O; the clock is an argument."""
