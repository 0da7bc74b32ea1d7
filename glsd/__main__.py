"""``python -m glsd COMMAND``, the same as the console command ``glsd``."""

from glsd.cli.main import main

if __name__ == "__main__":
    main()
