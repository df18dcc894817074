"""Parts of the built-in `math` reward (reward/math_answer.py): normalize, read, compare."""
