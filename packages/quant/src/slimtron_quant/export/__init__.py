"""The quantized model as files, and those files read back without ModelOpt."""
