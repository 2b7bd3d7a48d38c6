"""What `bpe-inspect` measures over documents, and how it shows tokens: in the terminal and on a page."""
