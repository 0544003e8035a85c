"""Entry point of `python -m hf_ddpm` and `accelerate launch -m hf_ddpm`, which do the same as `hf-ddpm`."""

from hf_ddpm.cli import main

if __name__ == "__main__":
    main()
