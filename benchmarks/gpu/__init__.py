"""Jobs for one GPU: README.md lists them."""
