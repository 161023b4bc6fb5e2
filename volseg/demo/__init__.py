"""A dataset that needs no download, to try volseg on."""
