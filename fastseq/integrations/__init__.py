"""fastseq under the interfaces of other packages; each module imports its package, so import the one that you use."""
