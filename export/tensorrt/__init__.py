"""From an artifact's ONNX to TensorRT engines: planned without a device, built with a bar, kept by what they are."""
