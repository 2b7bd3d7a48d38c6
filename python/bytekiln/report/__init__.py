"""What runs have written → one page, pictures, tables. Reads files only; never loads torch."""
