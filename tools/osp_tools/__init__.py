"""The `osp` command and what people run by hand."""
