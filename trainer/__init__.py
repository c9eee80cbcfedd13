import logging

# Without triton, which a machine without GPU needs not have, PyTorch's build with CUDA warns as it is imported.
logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
