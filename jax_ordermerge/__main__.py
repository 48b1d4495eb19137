"""`python -m jax_ordermerge`."""

from jax_ordermerge.cli import main

if __name__ == "__main__":
    main()
