#!/usr/bin/env python3
"""Send prompts to a text-generation server: tools/request_client.py --help."""

import sys

from megatron.early_exit.server.client_command import run

if __name__ == "__main__":
    sys.exit(run())
