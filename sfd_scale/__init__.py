import os

# Whoever asks for the CPU gets it on a machine with GPUs too: of every library, and before one of them looks for a GPU.
if os.environ.get("DS_ACCELERATOR") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
