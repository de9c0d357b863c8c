"""Reading rows by a recipe's mapping: the prompt, the answers, and which answer is better."""
