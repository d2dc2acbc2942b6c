"""Interfaces to HEAR, the Hugging Face Hub, ONNX, torch.export and scikit-learn."""
