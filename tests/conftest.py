import os

import torch

# Triton reads it when it is imported, which transformers does. Without a GPU its kernels can only
# be interpreted; with one, the same tests run them for real.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
