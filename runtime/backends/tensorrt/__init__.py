"""TensorRT engines at run time: which library, which device, which file. Building them is `export.tensorrt`'s work."""
