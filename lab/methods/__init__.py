"""The methods of the papers, one folder each, with the same few file names in every folder."""
