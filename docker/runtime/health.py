"""Exits with 0 if HEALTH_URL answers within three seconds, else says why not and exits with 1."""

import os
import sys
import urllib.request

url = os.environ["HEALTH_URL"]
try:
    urllib.request.urlopen(url, timeout=3).close()
except OSError as error:
    sys.exit(f"{url}: {error}")
