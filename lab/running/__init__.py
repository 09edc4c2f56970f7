"""How notebooks become runs: recipes and their parameters, run folders and their records, kernels, pools of runs and where they execute."""
