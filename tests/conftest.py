"""Tests are of the CPU, as bits do not repeat on a GPU; but for those of `make test-cuda`."""

import os
import signal
import sys
import threading

import pytest

if "STRIDE_TEST_CUDA" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def handlers_as_they_were():
    """A script run inside the tests' own process leaves its handlers behind."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    hooks = sys.excepthook, threading.excepthook
    yield
    sys.excepthook, threading.excepthook = hooks
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)
