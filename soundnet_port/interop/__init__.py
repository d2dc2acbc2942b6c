"""SoundNet in other programs: HEAR, the Hugging Face hub, ONNX, scikit-learn."""
