#!/usr/bin/env python3
"""Send prompts to a text-generation server: tools/request_client.py --help."""

import sys

from megatron.early_exit.platform.command_line import run_program
from megatron.early_exit.server.client_command import main

if __name__ == "__main__":
    sys.exit(run_program(main))
