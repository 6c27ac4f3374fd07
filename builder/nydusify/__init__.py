"""The command line of `nydusify`: words in, calls of `builder.convert` and others, messages."""
