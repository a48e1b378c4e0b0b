"""Tests are of the CPU: bits do not repeat on a GPU, and small networks are slower there."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
