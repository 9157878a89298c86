"""LXMERT's files: regions, questions, answers, and batches of them."""
