"""`python -m cache2cache` is `c2c`: what launchers of several processes start."""

from cache2cache.cli import main

if __name__ == "__main__":
    main()
