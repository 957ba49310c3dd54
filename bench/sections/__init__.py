"""What bench/synthesis.py is made of: articles cut into sections, their recovery, the judge."""
