"""Runs the command in the folder that is its first argument."""

import os
import sys

from aioinfer.cli import main

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    sys.exit(main(["serve", *sys.argv[2:]]))
