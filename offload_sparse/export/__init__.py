"""The final network in files that others read: torch.export, ONNX, folders for the Hugging Face Hub."""
