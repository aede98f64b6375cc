"""The narrow network on disk, in our format and those of others (torch.export, ONNX, folders for the Hugging
Face Hub), and reading it back."""
