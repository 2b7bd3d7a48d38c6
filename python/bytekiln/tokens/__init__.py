"""Token files of other people's formats, read and written beside ours, and the conversion between all of them."""
