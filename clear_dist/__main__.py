"""`python -m clear_dist`, and `torchrun -m clear_dist`: the command line."""

from clear_dist.cli import main

if __name__ == "__main__":
    main()
