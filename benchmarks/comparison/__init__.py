"""What the comparisons share: jobs, evaluation sets, answers and their grades, and the trainings that both run."""
